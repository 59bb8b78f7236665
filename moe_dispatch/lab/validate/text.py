"""Real text as tokens: one byte is one token."""

from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor

# 2**32 / phi and 2**32 / phi**2, phi the plastic number: the R2 low-discrepancy sequence (M. Roberts, 2018)
# in exact integers.
ROW_STRIDE = 3242174889
STEP_STRIDE = 2447445414


def default_text() -> bytes:
    """The topics of Python's ``help()`` in the order of their names: 466 kB of English in CPython 3.11."""
    return "\n".join(text for _, text in sorted(topics.topics.items())).encode()


def read_text(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: it is missing, a directory, unreadable or empty.
    """
    remedy = "name a file with some text, or leave --text out for the text that Python ships"
    if path.is_dir():
        raise ValueError(f"text {path} is a directory; {remedy}")
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"text {path} does not exist; {remedy}") from None
    except OSError as error:
        raise ValueError(f"text {path} cannot be read ({error.strerror}); {remedy}") from None
    if not text:
        raise ValueError(f"text {path} is empty; {remedy}")
    return text


def check_length(text: bytes, *, seq: int) -> None:
    """Raise ValueError unless one row of ``seq`` tokens fits into the text."""
    if len(text) < seq:
        raise ValueError(
            f"the text has {len(text)} bytes; a row of seq = {seq} tokens does not fit in: use a longer text, or "
            f"seq = {len(text)} at most"
        )


def sample(text: bytes, *, batch: int, seq: int, step: int) -> Tensor:
    """The global batch of one step: rows of bytes from places spread over the text by (step, row).

    Returns:
        token_BL: (batch, seq) int64.

    Raises:
        ValueError: a text shorter than ``seq`` bytes.
    """
    check_length(text, seq=seq)
    rows = []
    for row in range(batch):
        spread = (row * ROW_STRIDE + step * STEP_STRIDE) % 2**32
        start = spread * (len(text) - seq + 1) >> 32
        rows.append(torch.frombuffer(bytearray(text[start : start + seq]), dtype=torch.uint8))
    return torch.stack(rows).to(torch.int64)
