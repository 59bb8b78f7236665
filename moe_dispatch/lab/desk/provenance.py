"""Where numbers come from: what a JSON file says about the run that made it."""

import platform
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .exits import meaning_of
from .packaged import PACKAGE

CHECKOUT = PACKAGE.parent
DESCRIBE = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")


def provenance(arguments: Sequence[str]) -> dict[str, str]:
    """Versions, the commit of a checkout, the command line, host and time of now.

    Args:
        arguments: of the command line, without the program.
    """
    return {
        **versions(),
        "commit": commit_of(CHECKOUT),
        "command": shlex.join(["moe-dispatch", *arguments]),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Of this package, torch and Python."""
    try:
        ours = version("moe-dispatch")
    except PackageNotFoundError:  # a source tree on the path
        ours = "not installed"
    return {"moe_dispatch": ours, "torch": torch.__version__, "python": platform.python_version()}


def outcome(status: int, stopped: str = "") -> Mapping[str, object]:
    """How the run ended: the exit status and what it means; what stopped it, empty where nothing did."""
    return {"status": status, "status_means": meaning_of(status), "stopped": stopped}


def commit_of(checkout: Path) -> str:
    """The commit, with "-dirty" where files were changed since; empty where the package is in no checkout."""
    if not (checkout / ".git").exists():  # git would look in the folders above, which are others' repositories
        return ""
    try:
        found = subprocess.run(DESCRIBE, cwd=checkout, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git here, or none that reads it
        return ""
    return found.stdout.strip()
