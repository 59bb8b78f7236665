"""Which keys each query sees by its place, as ints: what causal attention, a window and documents say. Tensors that
are masks close further pairs; nobody knows of them here."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..blocks.pieces import FAR, Piece
from .runs import Rows, Run, Runs, union


class SeenBy(NamedTuple):
    """What consecutive queries of one document see.

    Attributes:
        queries: the run of them.
        keys: the run of those that at least one of them sees.
        shift: what to add to a query's place for the place of its own key.
        span: the document: the first query, the one after the last, and the same of its keys.
    """

    queries: Run
    keys: Run
    shift: int
    span: tuple[int, int, int, int]


class Seen:
    """Who sees whom. Each query sees one run of keys.

    Args:
        spans: (first query, end, first key, end) of each document, ascending; one of the whole sequence where there
            are no documents. The last query of a document is at the place of its last key.
        sides: how many keys before and after its own place a query sees, -1 for any.
    """

    __slots__ = ("_starts", "sides", "spans")

    def __init__(self, spans: Iterable[tuple[int, int, int, int]], sides: tuple[int, int]) -> None:
        self.spans = tuple(span for span in spans if span[0] < span[1])
        self.sides = sides
        self._starts = [span[0] for span in self.spans]

    def of_queries(self, run: Run) -> Iterator[SeenBy]:
        """For each document that the run touches; nothing for queries that see no key."""
        left, right = self.sides
        i = max(bisect_right(self._starts, run[0]) - 1, 0)
        while i < len(self.spans) and self.spans[i][0] < run[1]:
            span = self.spans[i]
            i += 1
            start, stop = max(run[0], span[0]), min(run[1], span[1])
            shift = span[3] - span[1]
            first = span[2] if left < 0 else max(span[2], start + shift - left)
            end = span[3] if right < 0 else min(span[3], stop + shift + right)
            if start < stop and first < end:
                yield SeenBy((start, stop), (first, end), shift, span)

    def needed(self, runs: Iterable[Run]) -> Runs:
        """The keys that at least one of these queries sees."""
        return union(seen.keys for run in runs for seen in self.of_queries(run))

    def pieces(self, queries: Rows, keys: Rows) -> list[Piece]:
        """All pairs of rows of two tensors that see each other, queries and then keys by place: the order in which
        they are summed."""
        left, right = self.sides
        found: list[Piece] = []
        for start, stop, row in queries.ascending:
            for seen in self.of_queries((start, stop)):
                first, end = seen.queries
                for place, k_row, size in keys.spans([seen.keys]):
                    own = first + seen.shift - place  # among these keys, that of the first query
                    found.append(
                        Piece(
                            q_row=row + first - start,
                            queries=end - first,
                            k_row=k_row,
                            keys=size,
                            low=max(own - left, -FAR) if left >= 0 else -FAR,
                            high=min(own + right, FAR) if right >= 0 else FAR,
                            q_place=first,
                            k_place=place,
                        )
                    )
        whole = (piece.part(0, piece.queries, 0, piece.keys) for piece in found)
        return [piece for piece in whole if not piece.is_empty]

    def pairs(self, runs: Iterable[Run]) -> int:
        """How many pairs of one of these queries and a key that it sees: the work of a head."""
        left, right = self.sides
        total = 0
        for run in runs:
            for (start, stop), _, shift, (_, _, first, end) in self.of_queries(run):
                start, stop = start + shift, stop + shift
                after = (stop - start) * end
                if right >= 0:
                    after = _sum_between(start + right + 1, stop + right + 1, first, end)
                before = (stop - start) * first
                if left >= 0:
                    before = _sum_between(start - left, stop - left, first, end)
                total += after - before
        return total


def _sum_between(start: int, stop: int, low: int, high: int) -> int:
    """The sum of the ints from ``start`` up to ``stop``, each raised to ``low`` and lowered to ``high``."""
    middle = [min(max(edge, low), high) for edge in (start, stop)]
    below, above = max(min(stop, low) - start, 0), max(stop - max(start, high), 0)
    return below * low + (middle[0] + middle[1] - 1) * (middle[1] - middle[0]) // 2 + above * high
