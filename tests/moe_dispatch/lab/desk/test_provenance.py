"""What a JSON file says about where its numbers come from."""

import re
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch

from moe_dispatch.lab.desk.provenance import commit_of, outcome, provenance


def test_a_run_is_described_so_that_it_can_be_repeated() -> None:
    found = provenance(["validate", "my config.toml", "--json", "out.json"])
    assert found["command"] == "moe-dispatch validate 'my config.toml' --json out.json"
    assert found["torch"] == torch.__version__
    assert re.match(r"3\.\d+", found["python"])
    assert found["moe_dispatch"]
    assert found["host"]
    date = datetime.fromisoformat(found["date"])
    assert date.utcoffset() == timedelta(0)
    assert abs(date - datetime.now(UTC)) < timedelta(minutes=1)


def git(folder: Path, *words: str) -> str:
    settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", *settings, *words], cwd=folder, capture_output=True, text=True, check=True, timeout=30
    ).stdout.strip()


def test_the_commit_is_that_of_the_checkout_and_tells_of_changes(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == ""
    git(tmp_path, "init", "--quiet")
    assert commit_of(tmp_path) == ""  # without a commit
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "-m", "a")
    git(tmp_path, "tag", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(tmp_path) == commit
    (tmp_path / "file").write_text("b")
    assert commit_of(tmp_path) == f"{commit}-dirty"
    (tmp_path / "site-packages").mkdir()
    assert commit_of(tmp_path / "site-packages") == ""  # installed inside somebody else's repository


def test_an_outcome_tells_what_the_status_means() -> None:
    assert outcome(0) == {"status": 0, "status_means": "everything ran and is right", "stopped": ""}
    assert outcome(1)["status_means"] == "something differs"
    assert outcome(3, "why")["stopped"] == "why"
    assert outcome(143)["status_means"] == "interrupted by SIGTERM"
