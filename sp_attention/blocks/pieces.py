"""Who sees whom, as ints: rows of queries and of keys, cut to what somebody sees, in tiles of bounded size."""

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from itertools import pairwise

FAR = 2**40  # no edge
# Rows of a tile of a narrow band: fewer compute fewer pairs that nobody sees, in more calls. With 256 keys per query
# and 4 heads of 64, 128 rows take 68 ms, 64 take 73 and 512 take 85.
BAND_ROWS = 128


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows of a tensor of queries, and of one of keys. Query i sees key j if low <= j - i <= high, both
    counted within the piece.

    Attributes:
        q_row, queries: the first row of queries, and how many.
        k_row, keys: of keys.
        low, high: the edges; beyond all keys where there is none.
        q_place, k_place: where the first query and the first key are in the sequence: masks and dropout go by it.
    """

    q_row: int
    queries: int
    k_row: int
    keys: int
    low: int
    high: int
    q_place: int
    k_place: int

    @classmethod
    def whole(cls, lengths: tuple[int, int], sides: tuple[int, int]) -> "Piece":
        """All queries and keys of a sequence, the last query at the place of the last key.

        Args:
            lengths: how many queries and keys.
            sides: how many keys before and after its own place a query sees, -1 for any.
        """
        (queries, keys), (left, right) = lengths, sides
        low = max(keys - queries - left, -FAR) if left >= 0 else -FAR
        high = min(keys - queries + right, FAR) if right >= 0 else FAR
        return cls(0, queries, 0, keys, low, high, 0, 0)

    @property
    def is_empty(self) -> bool:
        return self.queries <= 0 or self.keys <= 0

    @property
    def all_see_all(self) -> bool:
        return self.low + self.queries - 1 <= 0 and self.high >= self.keys - 1

    @property
    def is_causal(self) -> bool:
        """Whether query i sees the keys 0 to i."""
        return self.low + self.queries - 1 <= 0 and self.high == 0

    def part(self, query: int, queries: int, key: int, keys: int) -> "Piece":
        """So many queries and keys from these on, without queries that see no key there, and keys that no query
        sees. It may be empty; else each of its queries sees a key."""
        low, high = self.low + query - key, self.high + query - key
        first, last = max(0, -high), min(queries - 1, keys - 1 - low)
        first_key, end_key = max(0, low + first), min(keys, high + last + 1)
        query, key = query + first, key + first_key
        return Piece(
            q_row=self.q_row + query,
            queries=last - first + 1,
            k_row=self.k_row + key,
            keys=end_key - first_key,
            low=max(self.low + query - key, -FAR),
            high=min(self.high + query - key, FAR),
            q_place=self.q_place + query,
            k_place=self.k_place + key,
        )


def row_blocks(piece: Piece, chunk: int) -> Iterator[Piece]:
    """At most ``chunk`` queries each, with all keys that they see; fewer where each query sees few keys. Ascending.

    What they are depends on no number of heads, so that the bits of a head do not either.
    """
    rows = min(chunk, max(BAND_ROWS, (piece.high - piece.low + 1) // 4))
    for query in range(0, piece.queries, rows):
        block = piece.part(query, min(rows, piece.queries - query), 0, piece.keys)
        if not block.is_empty:
            yield block


def tiles(block: Piece, chunk: int) -> Iterator[Piece]:
    """The keys of a block of rows, at most ``chunk`` at a time. Ascending: the order of the sums.

    Where there is more than one tile, cuts are where an edge begins or ends too, so that most tiles need no mask.
    """
    edges = {0, block.keys}
    if block.keys > chunk:
        all_see_from = block.low + block.queries - 1
        edges |= {edge for edge in (all_see_from, block.high) if 0 < edge < block.keys}
    for start, end in pairwise(sorted(edges)):
        for key in range(start, end, chunk):
            tile = block.part(0, block.queries, key, min(chunk, end - key))
            if not tile.is_empty:
                yield tile


def as_ints(pieces: Iterable[Piece]) -> list[int]:
    """One after the other, for an operator, which takes no other values."""
    return [number for piece in pieces for number in astuple(piece)]


def of_ints(numbers: list[int]) -> list[Piece]:
    """The inverse of :func:`as_ints`."""
    size = len(fields(Piece))
    return [Piece(*numbers[start : start + size]) for start in range(0, len(numbers), size)]
