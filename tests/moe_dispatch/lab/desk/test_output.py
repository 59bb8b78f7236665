"""Output files are replaced whole or not at all, and refused before the work."""

import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from moe_dispatch.lab.desk.output import OutputError, check_output, is_stdout, replacing, write_json


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with suppress(KeyboardInterrupt), replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.txt"]
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["out.txt"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with replacing(tmp_path / "link") as part:
        part.write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "x"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "out.json", Path("-"), Path("/dev/null"), Path("/dev/stdout"), Path("/dev/full")):
        check_output(path)
    with pytest.raises(ValueError, match=r"folder .*none does not exist; create it, or name another"):
        check_output(tmp_path / "none" / "out.json")
    with pytest.raises(ValueError, match=r"cannot be written: it is a directory; name a file"):
        check_output(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ValueError, match=r"cannot be written: the folder .* is not writable; name another"):
        check_output(tmp_path / "out.json")
    with pytest.raises(ValueError, match="/dev/null cannot be written: it is not writable; name another"):
        check_output(Path("/dev/null"))


def test_a_pipe_or_device_is_written_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_json(path, {"a": math.nan})
        assert json.loads(os.read(reader, 100)) == {"a": None}
    finally:
        os.close(reader)
    assert path.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"^/dev/full was not written \(No space left on device\)$"):
        write_json(Path("/dev/full"), {})
    (tmp_path / "link").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"link was not written \(No space left on device\)$"):
        write_json(tmp_path / "link", {})


def test_standard_output_is_known_by_any_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert [is_stdout(path) for path in (None, Path("-"), Path("/dev/stdout"), Path("/proc/self/fd/1"))] == [
        False,
        True,
        True,
        True,
    ]
    assert not is_stdout(tmp_path / "out.json")
    write_json(Path("/dev/stdout"), {"a": 1})
    assert json.loads(capfd.readouterr().out) == {"a": 1}


def test_standard_output_that_no_descriptor_stands_for_has_one_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert not is_stdout(Path("/dev/null"))
    write_json(Path("-"), {"a": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_standard_output_on_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Path("/dev/full").open("w")  # noqa: SIM115  (to close it is to write, which fails)
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(OutputError, match=r"^standard output was not written \(No space left on device\)$"):
        write_json(Path("-"), {})
    with suppress(OSError):
        stream.close()
