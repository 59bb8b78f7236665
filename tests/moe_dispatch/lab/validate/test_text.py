"""Text becomes tokens byte by byte, the same on every rank; a text that cannot be used is refused."""

from pathlib import Path
from pydoc_data import topics

import pytest
import torch

from moe_dispatch.lab.validate.text import check_length, default_text, read_text, sample

COUNTING = bytes(range(256))


def test_default_text_is_the_english_that_python_ships() -> None:
    text = default_text()
    assert len(text) > 400_000
    assert text.count(b" the ") > 1000


def test_default_text_is_in_the_order_of_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topics, "topics", {"b": "second", "a": "first"})
    assert default_text() == b"first\nsecond"


def test_rows_are_consecutive_bytes() -> None:
    token_BL = sample(COUNTING, batch=5, seq=7, step=3)
    assert token_BL.shape == (5, 7)
    assert token_BL.dtype == torch.int64
    assert torch.equal(token_BL[:, 1:], token_BL[:, :-1] + 1)  # also: no window runs over the end


def test_a_row_depends_on_step_and_row_only() -> None:
    first_BL = sample(COUNTING, batch=2, seq=7, step=1)
    more_BL = sample(COUNTING, batch=5, seq=7, step=1)
    assert torch.equal(first_BL, more_BL[:2])
    assert not torch.equal(first_BL, sample(COUNTING, batch=2, seq=7, step=2))


def test_rows_are_spread_over_the_whole_text() -> None:
    start_SB = torch.stack([sample(COUNTING, batch=8, seq=1, step=step)[:, 0] for step in range(8)])
    assert len(start_SB.unique()) == 64
    assert torch.histc(start_SB.float(), bins=8, min=0, max=256).min() >= 6  # 8 of 64 each, were it perfect


def test_the_shortest_text_has_one_place_and_a_shorter_one_is_refused() -> None:
    token_BL = sample(COUNTING[:7], batch=3, seq=7, step=2)
    assert token_BL.tolist() == [list(range(7))] * 3
    message = (
        r"the text has 6 bytes; a row of seq = 7 tokens does not fit in: "
        r"use a longer text, or seq = 6 at most"
    )
    with pytest.raises(ValueError, match=message):
        sample(COUNTING[:6], batch=1, seq=7, step=0)
    with pytest.raises(ValueError, match=message):
        check_length(COUNTING[:6], seq=7)


def test_a_file_is_read_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xff\n\0x")
    assert read_text(path) == b"\xff\n\0x"


def test_a_file_that_cannot_be_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    remedy = "; name a file with some text, or leave --text out for the text that Python ships"
    with pytest.raises(ValueError, match=rf"none does not exist{remedy}"):
        read_text(tmp_path / "none")
    with pytest.raises(ValueError, match=rf"is a directory{remedy}"):
        read_text(tmp_path)
    with pytest.raises(ValueError, match=rf"empty is empty{remedy}"):
        read_text(tmp_path / "empty")
    with pytest.raises(ValueError, match=rf"cannot be read \(Not a directory\){remedy}"):
        read_text(tmp_path / "empty" / "file")
