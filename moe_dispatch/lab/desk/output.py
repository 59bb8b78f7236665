"""Output files: refused before the work where they cannot be written, and never left half written."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .exits import CouldNotRun

STDOUT = Path("-")


class OutputError(CouldNotRun):
    """A file could not be written after the work was done, e.g. on a full disk."""


def is_stdout(path: Path | None) -> bool:
    """Whether ``path`` is ``-``, or leads to where standard output goes, e.g. /dev/stdout. None does not."""
    if path is None or path == STDOUT:
        return path == STDOUT
    try:
        return os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # there is no such file, or a standard output that is none
        return False


def check_output(path: Path) -> None:
    """Raise ValueError unless a file can be written at ``path``, which may exist, or be a pipe or a device."""
    if is_stdout(path):
        return
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: the folder {folder} does not exist; create it, or name another")
    if path.is_dir():
        raise ValueError(f"{path} cannot be written: it is a directory; name a file")
    place, what = (path, "it") if _is_written_in_place(path) else (folder, f"the folder {folder}")
    if not os.access(place, os.W_OK):
        raise ValueError(f"{path} cannot be written: {what} is not writable; name another")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path in the same folder to write to. It replaces ``path`` if the block ends well, else it is deleted.

    A pipe or device is itself what is written to.

    Raises:
        OutputError: the operating system refused a write in the block.
    """
    target = path.resolve()  # the file that a link points to, not the link
    in_place = _is_written_in_place(path)
    part = path if in_place else target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        if not in_place:
            os.replace(part, target)
    except OSError as error:
        raise OutputError(f"{path} was not written ({error.strerror or error})") from error
    finally:
        if not in_place:
            part.unlink(missing_ok=True)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write ``document``, to standard output for ``-``; a NaN or infinity in it becomes null.

    Raises:
        OutputError: it could not be written.
    """
    text = json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"
    if is_stdout(path):
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as error:
            raise OutputError(f"standard output was not written ({error.strerror or error})") from error
        return
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def _is_written_in_place(path: Path) -> bool:
    """os.replace would put a file in the place of a device or a pipe."""
    return path.exists() and not path.is_file()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
