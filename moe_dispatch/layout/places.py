"""One sequence cut into pieces, and which of them each of its ranks holds: arithmetic along one dimension.

The *stacked* sequence is what the ranks hold, rank after rank. Ranks cut it into contiguous parts, so all that a list
of pieces adds to contiguous shards is a permutation between a place and where it is stacked.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import overload
from zlib import crc32

import torch
from torch import Tensor

from .frozen import Frozen
from .on_device import ints_on
from .partition import Partition

Run = tuple[int, int]
Held = tuple[tuple[int, ...], ...]
LONGEST_TEXT = 200  # characters of a list of pieces in facts and errors


class Places(Frozen):
    """The places of one sequence, 0 to L - 1, over the ranks that it is spread over.

    Args:
        seq: the pieces.
        held: the pieces of each rank, in the order of its tensor.

    Attributes:
        seq, held: as given.
        lengths: how many places each rank holds.
        runs: (start, stop) of the consecutive places of each rank, in the order of its tensor. Pieces that follow
            each other are one run. A rank without places has one run, which is empty.
        text: ``held`` in words, of bounded length, that differ where it differs.

    Raises:
        ValueError: pieces that are held twice or not at all, or that there are not.
    """

    seq: Partition
    held: Held
    lengths: Partition
    runs: tuple[tuple[Run, ...], ...]
    text: str
    _place_of_stacked: "Shifts"
    _stacked_of_place: "Shifts"

    _defining = ("seq", "held")
    __slots__ = ("_place_of_stacked", "_stacked_of_place", "held", "lengths", "runs", "seq", "text")

    def __init__(self, seq: Partition, held: Held) -> None:
        spans = tuple((start, start + size) for start, size in zip(seq.offsets, seq.sizes, strict=True))
        if held == in_order(seq):  # a thousand contiguous shards are made in every step
            runs, lengths, text, shifts = tuple((span,) for span in spans), seq, "in order", []
        else:
            _check_held(held, len(seq))
            runs = tuple(_runs([spans[piece] for piece in pieces]) for pieces in held)
            lengths = Partition(sum(stop - start for start, stop in of_rank) for of_rank in runs)
            text, shifts = _bounded(f"{held}"), _shifts(joined(list(chain(*runs))))
        for name, value in (
            ("seq", seq),
            ("held", held),
            ("lengths", lengths),
            ("runs", runs),
            ("text", text),
            ("_place_of_stacked", Shifts(shifts)),
            ("_stacked_of_place", Shifts(sorted((at + by, -by) for at, by in shifts))),
        ):
            object.__setattr__(self, name, value)

    @overload
    def place(self, stacked: int) -> int: ...
    @overload
    def place(self, stacked: Tensor) -> Tensor: ...
    def place(self, stacked: int | Tensor) -> int | Tensor:
        """The place at an index of the stacked sequence: an int, or int64 of any shape."""
        moved = self._place_of_stacked
        return moved.of_one(stacked) if isinstance(stacked, int) else moved.of(stacked)

    def stacked(self, place: Tensor) -> Tensor:
        """The inverse of :meth:`place`."""
        return self._stacked_of_place.of(place)


class Shifts(Frozen):
    """A permutation of a sequence that moves whole runs of it.

    Args:
        shifts: (start, by) of each run, ascending; the first starts at 0.
    """

    starts: tuple[int, ...]
    by: tuple[int, ...]

    _defining = ("shifts",)
    __slots__ = ("by", "shifts", "starts")

    def __init__(self, shifts: Iterable[tuple[int, int]]) -> None:
        pairs = tuple(shifts)
        object.__setattr__(self, "shifts", pairs)
        object.__setattr__(self, "starts", tuple(start for start, _ in pairs))
        object.__setattr__(self, "by", tuple(by for _, by in pairs))

    def of_one(self, index: int) -> int:
        return index + self.by[bisect_right(self.starts, index) - 1] if self.by else index

    def of(self, index: Tensor) -> Tensor:
        if len(self.by) < 2:  # one run stays where it is
            return index
        ends, by = (ints_on(x, index.device) for x in (self.starts[1:], self.by))
        return index + by[torch.bucketize(index, ends, right=True)]


def as_held(held: Iterable[Iterable[int]]) -> Held:
    """As tuples, or ValueError."""
    try:
        return tuple(map(tuple, held))
    except TypeError:
        raise ValueError(
            f"held is {held!r}; give the pieces of each rank of the sequence, e.g. [(0, 3), (1, 2)] for two ranks"
        ) from None


def in_order(seq: Partition) -> Held:
    """Rank r holds piece r: contiguous shards."""
    return tuple((piece,) for piece in range(len(seq)))


def joined(runs: Sequence[Run]) -> list[Run]:
    """The same places in as few runs as can be, none of them empty."""
    found: list[Run] = []
    for start, stop in runs:
        if start == stop:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def _runs(pieces: Sequence[Run]) -> tuple[Run, ...]:
    return tuple(joined(pieces)) or ((*pieces, (0, 0))[0],)


def _shifts(stacked: Sequence[Run]) -> list[tuple[int, int]]:
    """For each run of the stacked sequence where it starts there, and how far away it is in the sequence."""
    starts = accumulate((stop - start for start, stop in stacked), initial=0)
    return [(at, start - at) for at, (start, _) in zip(starts, stacked, strict=False)]


def _bounded(text: str) -> str:
    """Text that differs where ``text`` does."""
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 12]}... {crc32(text.encode()):08x}"


def _check_held(held: Held, num_pieces: int) -> None:
    if not held:
        raise ValueError("held is empty; give the pieces of each rank of the sequence, () for a rank without any")
    ranks_of_piece: list[list[int]] = [[] for _ in range(num_pieces)]
    for rank, pieces in enumerate(held):
        for piece in pieces:
            if type(piece) is not int or not 0 <= piece < num_pieces:
                raise ValueError(
                    f"held gives rank {rank} the piece {piece!r}; the pieces of seq are 0 to {num_pieces - 1}"
                )
            ranks_of_piece[piece].append(rank)
    for piece, ranks in enumerate(ranks_of_piece):
        if len(ranks) != 1:
            fact = f"{len(ranks)} times, by ranks {ranks}" if ranks else "by no rank"
            raise ValueError(
                f"piece {piece} is held {fact}; the ranks have to hold each of the {num_pieces} pieces once"
            )
