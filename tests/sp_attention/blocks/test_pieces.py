"""Tiles cover each pair that is seen once, and no tile is computed for nothing: pair by pair, over small sizes."""

from collections import Counter
from itertools import product

import pytest

from sp_attention.blocks.pieces import BAND_ROWS, FAR, Piece, as_ints, of_ints, row_blocks, tiles

SIDES = [-1, 0, 1, 3, 200]


def seen(lengths: tuple[int, int], sides: tuple[int, int]) -> set[tuple[int, int]]:
    """(query, key) of each pair, the last query at the place of the last key."""
    (queries, keys), (left, right) = lengths, sides
    found = set()
    for query, key in product(range(queries), range(keys)):
        distance = key - (query + keys - queries)
        if (left < 0 or distance >= -left) and (right < 0 or distance <= right):
            found.add((query, key))
    return found


def pairs_of(piece: Piece) -> list[tuple[int, int]]:
    """By rows of the tensors, in the order of queries."""
    inside = product(range(piece.queries), range(piece.keys))
    return [(piece.q_row + i, piece.k_row + j) for i, j in inside if piece.low <= j - i <= piece.high]


def all_tiles(piece: Piece, chunk: int) -> list[Piece]:
    return [tile for block in row_blocks(piece, chunk) for tile in tiles(block, chunk)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("lengths", [(1, 1), (7, 7), (4, 9), (9, 4), (1, 6), (6, 1), (11, 5)])
def test_each_seen_pair_is_in_one_tile(lengths: tuple[int, int], chunk: int) -> None:
    for sides in product(SIDES, SIDES):
        found = all_tiles(Piece.whole(lengths, sides), chunk)
        assert Counter(pair for tile in found for pair in pairs_of(tile)) == Counter(seen(lengths, sides))
        for tile in found:
            pairs = pairs_of(tile)
            rows = {query for query, _ in pairs}
            assert rows == set(range(tile.q_row, tile.q_row + tile.queries)), "a row of a tile that sees nothing"
            keys = {key for _, key in pairs}
            assert {min(keys), max(keys)} == {tile.k_row, tile.k_row + tile.keys - 1}, "keys that nobody sees"
            assert max(tile.queries, tile.keys) <= chunk
            assert (tile.q_place, tile.k_place) == (tile.q_row, tile.k_row)
            assert tile.all_see_all == (len(pairs) == tile.queries * tile.keys)
            below = [
                (tile.q_row + i, tile.k_row + j) for i in range(tile.queries) for j in range(tile.keys) if j <= i
            ]
            assert tile.is_causal <= (pairs == below)


@pytest.mark.parametrize("sides", [(-1, -1), (-1, 0), (2, 0), (2, 3)])
def test_the_keys_of_a_query_come_in_ascending_order(sides: tuple[int, int]) -> None:
    """The order of the sums."""
    for block in row_blocks(Piece.whole((9, 12), sides), 3):
        starts = [tile.k_row for tile in tiles(block, 3)]
        assert starts == sorted(set(starts))


def test_a_causal_call_needs_no_mask() -> None:
    """Where the kernel has a causal flag. Keys in one tile are not cut."""
    found = all_tiles(Piece.whole((700, 700), (-1, 0)), 100)
    assert all(tile.all_see_all or tile.is_causal for tile in found)
    assert len(found) == 7 * 8 // 2
    assert len(all_tiles(Piece.whole((700, 700), (-1, 0)), 700)) == 1


def test_a_window_costs_what_it_sees() -> None:
    length, keys = 4096, 257
    found = all_tiles(Piece.whole((length, length), (keys - 1, 0)), 512)
    assert sum(tile.queries * tile.keys for tile in found) < 1.6 * length * keys
    assert max(tile.queries for tile in found) == BAND_ROWS
    assert len(found) == length // BAND_ROWS


def test_edges_beyond_all_keys_are_none() -> None:
    huge = 10**30
    piece = Piece.whole((5, 7), (huge, huge))
    assert (piece.low, piece.high) == (-FAR, FAR)
    assert piece.all_see_all
    assert piece.part(2, 2, 3, 3).all_see_all
    assert piece.part(2, 2, 3, 3).high <= FAR


def test_places_move_with_rows() -> None:
    """Rows that came from elsewhere: their places are not their numbers."""
    piece = Piece(q_row=2, queries=6, k_row=1, keys=8, low=-3, high=1, q_place=20, k_place=10)
    part = piece.part(3, 3, 1, 7)
    assert (part.q_place - part.q_row, part.k_place - part.k_row) == (18, 9)
    inside = {(query, key) for query, key in pairs_of(piece) if query in range(5, 8) and key in range(2, 9)}
    assert set(pairs_of(part)) == inside


@pytest.mark.parametrize("cut", [(0, 4, 0, 0), (0, 0, 0, 5), (3, 1, 0, 2), (0, 1, 4, 3)])
def test_a_part_without_a_seen_pair_is_empty(cut: tuple[int, int, int, int]) -> None:
    assert Piece.whole((4, 7), (1, 0)).part(*cut).is_empty


def test_as_ints_and_back() -> None:
    pieces = [Piece.whole((5, 7), (2, 0)), Piece(1, 2, 3, 4, 5, 6, 7, 8)]
    assert of_ints(as_ints(pieces)) == pieces
    assert of_ints([]) == []
