"""What each team of ranks gets in a turn, and who holds it.

In a ring of many ranks, a rank asks what few of them get: so it is worked out when somebody asks.
"""

from bisect import bisect_right
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
            i = max(bisect_right(self._starts, start) - 1, 0)
            while i < len(self._by_place) and self._by_place[i][0] < stop:
                first, end, rank = self._by_place[i]
                low, high = max(start, first), min(stop, end)
                if low < high:
                    found.setdefault(rank, []).append((low, high))
                i += 1
        return found
