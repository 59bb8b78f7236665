"""What each team of ranks gets in a turn, and who holds it.

In a ring of many ranks, a rank asks what few of them get: so it is worked out when somebody asks.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

from .runs import Run, Runs, common, count, in_blocks


class Wanted:
    """What each team gets in one turn.

    Args:
        teams: their numbers.
        of: the runs that one of them gets, ascending.
        receivers: the teams that may get something of one of them; all others get nothing of it.
        most: no team gets more rows than that.
    """

    __slots__ = ("_of", "_runs", "most", "receivers", "teams")

    def __init__(self, teams: range, of: Callable[[int], Runs], receivers: Callable[[int], range], most: int) -> None:
        self.teams, self.receivers, self.most = teams, receivers, most
        self._of, self._runs = of, dict[int, Runs]()

    def of(self, team: int) -> Runs:
        if team not in self._runs:
            self._runs[team] = self._of(team)
        return self._runs[team]

    @property
    def is_empty(self) -> bool:
        """Whether no team gets anything."""
        return not any(self.of(team) for team in self.teams)

    def cut(self, most: int) -> list["Wanted"]:
        """Of each team at most so many rows in a turn. No turns where nobody gets any."""
        if self.most <= most:
            return [] if self.is_empty else [self]
        num = max(-(-count(self.of(team)) // most) for team in self.teams)
        return [Wanted(self.teams, Block(self.of, most, i), self.receivers, most) for i in range(num)]


class Block:
    """Of what each team gets, the rows of one of several turns."""

    __slots__ = ("i", "most", "of")

    def __init__(self, of: Callable[[int], Runs], most: int, i: int) -> None:
        self.of, self.most, self.i = of, most, i

    def __call__(self, team: int) -> Runs:
        blocks = in_blocks(self.of(team), self.most)
        return blocks[self.i] if self.i < len(blocks) else ()


class Holders:
    """Which rank holds which places.

    Args:
        held: the runs of each rank, in the order of its tensor.
    """

    __slots__ = ("_by_place", "_by_rank", "_starts")

    def __init__(self, held: Sequence[Runs]) -> None:
        self._by_rank = [sorted(run for run in runs if run[0] < run[1]) for runs in held]
        self._by_place = sorted((*run, rank) for rank, runs in enumerate(self._by_rank) for run in runs)
        self._starts = [start for start, _, _ in self._by_place]

    def units(self, rank: int, wanted: Runs) -> Runs:
        """What is wanted of what a rank holds, in runs that are contiguous in its tensor and wherever they arrive:
        cut at its own runs, which the receiver may have side by side in another order. Ascending."""
        return common(self._by_rank[rank], wanted)

    def of_all(self, wanted: Runs) -> dict[int, list[Run]]:
        """:meth:`units` of each rank that has any."""
        found: dict[int, list[Run]] = {}
        for start, stop in wanted:
            for first, end, rank in self._touched(start, stop):
                found.setdefault(rank, []).append((max(start, first), min(stop, end)))
        return found

    def rows(self, wanted: Runs) -> dict[int, int]:
        """How many places :meth:`of_all` has of each rank."""
        found: dict[int, int] = {}
        for start, stop in wanted:
            touched = self._touched(start, stop)
            for first, end, rank in touched:
                found[rank] = found.get(rank, 0) + end - first
            if touched:  # the first and the last may reach beyond
                (first, _, rank), (_, end, last) = touched[0], touched[-1]
                found[rank] -= max(start - first, 0)
                found[last] -= max(end - stop, 0)
        return found

    def _touched(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(start, stop, rank) of the runs that have a place of this one, which is not empty."""
        i, j = bisect_right(self._starts, start), bisect_left(self._starts, stop)
        before = self._by_place[i - 1 : i]  # those that start before it
        return (before if before and before[0][1] > start else []) + self._by_place[i:j]
