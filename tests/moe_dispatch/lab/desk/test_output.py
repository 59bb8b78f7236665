"""Output files are replaced whole or not at all, and refused before the work."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from moe_dispatch.lab.desk.output import check_output, replacing


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
    check_output(tmp_path / "out.json")
    with pytest.raises(ValueError, match=r"folder .*none does not exist; create it, or name another"):
        check_output(tmp_path / "none" / "out.json")
    with pytest.raises(ValueError, match=r"cannot be written: it is no regular file; name another"):
        check_output(tmp_path)
    with pytest.raises(ValueError, match="it is no regular file"):
        check_output(Path("/dev/null"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ValueError, match="is not writable; name another"):
        check_output(tmp_path / "out.json")
