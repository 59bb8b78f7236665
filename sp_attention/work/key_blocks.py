"""Rows of keys that are made a block at a time, and who sees them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..blocks.pieces import Piece
from .runs import Run, union


def blocks_of_keys(pieces: Sequence[Piece], most: int) -> Iterator[tuple[Run, Sequence[Piece]]]:
    """The rows of keys that some piece has, consecutive ones and at most ``most`` at once, and the pieces of them, in
    which they are counted from the first of the block. Ascending: the order of the sums."""
    for first, end in union((piece.k_row, piece.k_row + piece.keys) for piece in pieces):
        for start in range(first, end, most):
            stop = min(start + most, end)
            near = (piece for piece in pieces if piece.k_row < stop and start < piece.k_row + piece.keys)
            parts = (_of_keys(piece, start, stop) for piece in near)
            yield (start, stop), [part for part in parts if not part.is_empty]


def _of_keys(piece: Piece, start: int, stop: int) -> Piece:
    """The part of a piece with these rows of keys, counted from the first of them."""
    first, end = max(start, piece.k_row), min(stop, piece.k_row + piece.keys)
    part = piece.part(0, piece.queries, first - piece.k_row, end - first)
    return replace(part, k_row=part.k_row - start)
