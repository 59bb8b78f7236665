"""Calls of an ``attend`` of the caller's: consecutive queries of one document, with the keys that they see."""

from collections.abc import Iterator
from typing import NamedTuple

from .runs import Rows, Run
from .seen import Seen


class Part(NamedTuple):
    """One call.

    Attributes:
        q_row, k_row: the first rows, of queries and of keys.
        queries, keys: their places.
        start: of the document: the first place of its queries, and of its keys.
        beyond: how many of the keys come after the last query's own.
    """

    q_row: int
    k_row: int
    queries: Run
    keys: Run
    start: tuple[int, int]
    beyond: int


def parts(seen: Seen, queries: Rows, keys: Rows) -> Iterator[Part]:
    """In the order of the rows of queries; rows that see no key are in none.

    Args:
        seen: who sees whom.
        queries, keys: all that are at hand. Keys that one run of queries sees are consecutive there.
    """
    row = 0
    for start, stop in queries.runs:
        for of in seen.of_queries((start, stop)):
            ((_, k_row, _),) = keys.spans([of.keys])
            yield Part(
                q_row=row + of.queries[0] - start,
                k_row=k_row,
                queries=of.queries,
                keys=of.keys,
                start=(of.span[0], of.span[2]),
                beyond=of.keys[1] - (of.queries[1] + of.shift),
            )
        row += stop - start
