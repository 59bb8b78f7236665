"""Runs of places, as ints: (start, stop). Sets of them, and where they are in a tensor."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

Run = tuple[int, int]
Runs = tuple[Run, ...]


def union(runs: Iterable[Run]) -> Runs:
    """The same places in ascending runs, as few as can be, none of them empty."""
    found: list[Run] = []
    for start, stop in sorted(run for run in runs if run[0] < run[1]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return tuple(found)


def common(some: Sequence[Run], others: Sequence[Run]) -> Runs:
    """The places that are in both; each is ascending, and holds no place twice."""
    found, i, j = list[Run](), 0, 0
    while i < len(some) and j < len(others):
        start, stop = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if start < stop:
            found.append((start, stop))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def without(some: Sequence[Run], others: Sequence[Run]) -> Runs:
    """The places of ``some`` that are not in ``others``; each is ascending, and holds no place twice."""
    found, at, j = list[Run](), 0, 0
    for start, stop in some:
        at = start
        while j < len(others) and others[j][1] <= at:
            j += 1
        k = j
        while k < len(others) and others[k][0] < stop:
            if at < others[k][0]:
                found.append((at, others[k][0]))
            at = max(at, others[k][1])
            k += 1
        if at < stop:
            found.append((at, stop))
    return tuple(found)


def count(runs: Iterable[Run]) -> int:
    """How many places."""
    return sum(stop - start for start, stop in runs)


def in_blocks(runs: Sequence[Run], most: int) -> list[Runs]:
    """The same places in order, in lists of at most ``most`` places."""
    blocks, left = list[list[Run]](), 0
    for start, stop in runs:
        while start < stop:
            if not left:
                blocks.append([])
                left = most
            middle = min(start + left, stop)
            blocks[-1].append((start, middle))
            left -= middle - start
            start = middle
    return [tuple(block) for block in blocks]


class Rows:
    """Where places are in a tensor whose rows are those of some runs, one run after the other.

    Args:
        runs: in the order of the tensor; no place twice.

    Attributes:
        runs: those that are not empty.
        size: how many rows.
        ascending: (start, stop, first row) of each run, by place.
    """

    __slots__ = ("_starts", "ascending", "runs", "size")

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = tuple(run for run in runs if run[0] < run[1])
        firsts = accumulate((stop - start for start, stop in self.runs), initial=0)
        self.ascending = sorted((*run, first) for run, first in zip(self.runs, firsts, strict=False))
        self.size = count(self.runs)
        self._starts = [start for start, _, _ in self.ascending]

    def spans(self, wanted: Iterable[Run]) -> list[tuple[int, int, int]]:
        """(first place, first row, rows) of what is here of ascending runs, by place."""
        found: list[tuple[int, int, int]] = []
        for start, stop in wanted:
            i = max(bisect_right(self._starts, start) - 1, 0)
            while i < len(self.ascending) and self.ascending[i][0] < stop:
                first, end, row = self.ascending[i]
                low, high = max(start, first), min(stop, end)
                if low < high:
                    found.append((low, row + low - first, high - low))
                i += 1
        return found
