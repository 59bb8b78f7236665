"""Text becomes tokens byte by byte, the same on every rank; a text that cannot be used is refused."""

import os
import tracemalloc
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from torch import Tensor

from moe_dispatch.lab.validate.text import Corpus, batches_of_bytes, batches_of_file, default_text, starts

COUNTING = bytes(range(256))


def test_default_text_is_the_english_that_python_ships() -> None:
    text = default_text()
    assert len(text) > 400_000
    assert text.count(b" the ") > 1000


def test_default_text_is_in_the_order_of_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topics, "topics", {"b": "second", "a": "first"})
    assert default_text() == b"first\nsecond"


def batches(text: bytes, batch: int, seq: int, *, steps: int = 1) -> Tensor:
    return batches_of_bytes(text, [(batch, seq)], steps=steps).token_SBL_of_shape[batch, seq]


def test_rows_are_consecutive_bytes() -> None:
    token_SBL = batches(COUNTING, 5, 7, steps=4)
    assert token_SBL.shape == (4, 5, 7)
    assert token_SBL.dtype == torch.uint8
    assert torch.equal(token_SBL[..., 1:], token_SBL[..., :-1] + 1)  # also: no window runs over the end


def test_a_row_depends_on_step_and_row_only() -> None:
    first_SBL, more_SBL = batches(COUNTING, 2, 7, steps=2), batches(COUNTING, 5, 7, steps=3)
    assert torch.equal(first_SBL, more_SBL[:2, :2])
    assert not torch.equal(more_SBL[1], more_SBL[2])


def test_rows_are_spread_over_the_whole_text() -> None:
    start_SB = torch.tensor([starts(256, batch=8, seq=1, step=step) for step in range(8)])
    assert len(start_SB.unique()) == 64
    assert torch.histc(start_SB.float(), bins=8, min=0, max=256).min() >= 6  # 8 of 64 each, were it perfect


def test_the_shortest_text_has_one_place_and_a_shorter_one_is_refused() -> None:
    assert batches(COUNTING[:7], 3, 7)[0].tolist() == [list(range(7))] * 3
    message = (
        r"the text has 6 bytes; a row of seq = 7 tokens does not fit in: "
        r"use a longer text, or seq = 6 at most"
    )
    with pytest.raises(ValueError, match=message):
        batches_of_bytes(COUNTING[:6], [(1, 3), (1, 7)], steps=1)


def test_a_file_is_the_same_text_as_its_bytes(tmp_path: Path) -> None:
    path, text = tmp_path / "text", bytes(reversed(range(256)))
    path.write_bytes(text)
    shapes = [(2, 5), (3, 1), (2, 5)]
    of_file = batches_of_file(path, shapes, steps=2)
    of_bytes = batches_of_bytes(text, shapes, steps=2)
    assert list(of_file.token_SBL_of_shape) == [(2, 5), (3, 1)]
    for shape, token_SBL in of_bytes.token_SBL_of_shape.items():
        assert torch.equal(of_file.token_SBL_of_shape[shape], token_SBL)
    assert (of_file.name, of_file.size, of_file.used) == (str(path), 256, 2 * (10 + 3))
    assert of_file.digest == of_bytes.digest
    assert of_file.digest != batches_of_bytes(text, shapes[:1], steps=2).digest


def test_of_a_huge_file_only_what_is_used_is_read(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.touch()
    os.truncate(path, 2**42)  # 4 TB, of which the disk has nothing
    tracemalloc.start()
    try:
        corpus: Corpus = batches_of_file(path, [(3, 100)], steps=4)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert (corpus.size, corpus.used) == (2**42, 1200)


def test_a_file_that_becomes_shorter_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_bytes(bytes(100))
    monkeypatch.setattr(os, "pread", lambda *_: b"123")
    with pytest.raises(ValueError, match="text became shorter while it was read; name a file that nobody writes to"):
        batches_of_file(tmp_path / "text", [(1, 5)], steps=1)


def test_a_file_that_cannot_be_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    remedy = "; name a file with some text, or leave --text out for the text that Python ships"
    for name, told in (
        ("none", f"none does not exist{remedy}"),
        ("", f"is a directory{remedy}"),
        ("empty", f"empty is empty{remedy}"),
        ("empty/file", rf"cannot be read \(Not a directory\){remedy}"),
        ("pipe", "pipe is a pipe or a device; rows are read from all over a text: write it to a file first"),
        ("/dev/zero", "text /dev/zero is a pipe or a device"),
    ):
        with pytest.raises(ValueError, match=told):
            batches_of_file(tmp_path / name, [(1, 1)], steps=1)
