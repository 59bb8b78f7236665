"""Real text as tokens: one byte is one token. Only the bytes that the rows train on are read."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor

# 2**32 / phi and 2**32 / phi**2, phi the plastic number: the R2 low-discrepancy sequence (M. Roberts, 2018)
# in exact integers.
ROW_STRIDE = 3242174889
STEP_STRIDE = 2447445414

REMEDY = "name a file with some text, or leave --text out for the text that Python ships"
Shape = tuple[int, int]  # B, L


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """The batches of a run, out of one text.

    Attributes:
        name: of the file, or what the text is.
        size: bytes in all.
        token_SBL_of_shape: for each (B, L), those of every step S, uint8.
    """

    name: str
    size: int
    token_SBL_of_shape: Mapping[Shape, Tensor]

    @property
    def used(self) -> int:
        """Bytes that the run trains on."""
        return sum(token_SBL.numel() for token_SBL in self.token_SBL_of_shape.values())

    @property
    def digest(self) -> str:
        """SHA-256 of all batches, with their shapes."""
        found = hashlib.sha256()
        for shape, token_SBL in self.token_SBL_of_shape.items():
            found.update(repr(shape).encode())
            found.update(bytes(token_SBL.flatten().tolist()))
        return found.hexdigest()


def default_text() -> bytes:
    """The topics of Python's ``help()`` in the order of their names: 466 kB of English in CPython 3.11."""
    return "\n".join(text for _, text in sorted(topics.topics.items())).encode()


def batches_of_bytes(text: bytes, shapes: Iterable[Shape], *, steps: int, name: str = "given bytes") -> Corpus:
    """The batches of ``shapes`` out of ``text``.

    Raises:
        ValueError: a row does not fit in.
    """
    return _batches(len(text), lambda start, count: text[start : start + count], shapes, steps=steps, name=name)


def batches_of_file(path: Path, shapes: Iterable[Shape], *, steps: int) -> Corpus:
    """The batches of ``shapes`` out of a file; the rest of it is not read.

    Raises:
        ValueError: it is missing, no regular file, unreadable, empty, or a row does not fit in.
    """
    try:
        mode = path.stat().st_mode  # before it is opened: to open a pipe waits for who writes
        if stat.S_ISDIR(mode):
            raise ValueError(f"text {path} is a directory; {REMEDY}")
        if not stat.S_ISREG(mode):
            raise ValueError(
                f"text {path} is a pipe or a device; rows are read from all over a text: write it to a file first"
            )
        with path.open("rb", buffering=0) as file:
            if not (size := os.fstat(file.fileno()).st_size):
                raise ValueError(f"text {path} is empty; {REMEDY}")
            return _batches(
                size, lambda start, count: os.pread(file.fileno(), count, start), shapes, steps=steps, name=str(path)
            )
    except FileNotFoundError:
        raise ValueError(f"text {path} does not exist; {REMEDY}") from None
    except OSError as error:
        raise ValueError(f"text {path} cannot be read ({error.strerror}); {REMEDY}") from None


def starts(size: int, *, batch: int, seq: int, step: int) -> list[int]:
    """Where in a text of ``size`` bytes the rows of one step start: spread over it by (step, row)."""
    places = size - seq + 1
    return [(row * ROW_STRIDE + step * STEP_STRIDE) % 2**32 * places >> 32 for row in range(batch)]


def _batches(
    size: int, read: Callable[[int, int], bytes], shapes: Iterable[Shape], *, steps: int, name: str
) -> Corpus:
    shapes = list(dict.fromkeys(shapes))
    longest = max(seq for _, seq in shapes)
    if size < longest:
        raise ValueError(
            f"the text has {size} bytes; a row of seq = {longest} tokens does not fit in: use a longer text, or "
            f"seq = {size} at most"
        )
    token_SBL_of_shape = {}
    for batch, seq in shapes:
        rows = [read(start, seq) for step in range(steps) for start in starts(size, batch=batch, seq=seq, step=step)]
        if any(len(row) != seq for row in rows):
            raise ValueError(f"text {name} became shorter while it was read; name a file that nobody writes to")
        token_T = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8)
        token_SBL_of_shape[batch, seq] = token_T.view(steps, batch, seq)
    return Corpus(name=name, size=size, token_SBL_of_shape=token_SBL_of_shape)
