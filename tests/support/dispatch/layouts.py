"""Grids of tokens cut over ranks, by slicing: no index formula of the library's stands against another one."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Order = Literal["BL", "LB"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A (B, L) grid cut into rectangles, or (L, B) for order "LB"; rank r holds (r // len(seq), r % len(seq))."""

    batch: tuple[int, ...]
    seq: tuple[int, ...]
    order: Order = "BL"

    @property
    def ranks(self) -> int:
        return len(self.batch) * len(self.seq)

    @property
    def grid(self) -> tuple[int, int]:
        rows, length = sum(self.batch), sum(self.seq)
        return (rows, length) if self.order == "BL" else (length, rows)

    def cut(self, x_BLD: Tensor) -> list[Tensor]:
        """Every rank's piece of the whole, by slicing."""
        batch_dim, seq_dim = (0, 1) if self.order == "BL" else (1, 0)
        return [piece for rows in x_BLD.split(self.batch, batch_dim) for piece in rows.split(self.seq, seq_dim)]

    def ids(self) -> tuple[Tensor, Tensor, Tensor]:
        """The grids of global token ids, of rows and of positions."""
        return id_grids(sum(self.batch), sum(self.seq), self.order)


@cache
def id_grids(rows: int, length: int, order: Order) -> tuple[Tensor, Tensor, Tensor]:
    row_BL = torch.arange(rows).unsqueeze(1).expand(rows, length)
    position_BL = torch.arange(length).expand(rows, length)
    if order == "LB":
        row_BL, position_BL = row_BL.T, position_BL.T
    return torch.arange(rows * length).view(row_BL.shape), row_BL, position_BL


def compositions(total: int, pieces: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut ``total`` into that many consecutive pieces, empty ones included."""
    if pieces == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, pieces - 1):
            yield (first, *rest)


EXPERTS: dict[int, list[tuple[int, ...]]] = {
    1: [(4,), (1,), (5,)],
    2: [(2, 2), (0, 3), (4, 1), (3, 0)],
    3: [(2, 2, 2), (3, 0, 2), (0, 1, 4), (1, 1, 0)],
    4: [(1, 1, 1, 1), (2, 0, 3, 1), (0, 4, 0, 0), (2, 2, 2, 2)],
}


def layouts(ranks: int) -> list[Layout]:
    """Shards that are even, uneven and empty; cut along the sequence, the batch and both; 0, 1, 2 and more tokens."""
    uneven = {1: [(5,)], 2: [(3, 2), (0, 5)], 3: [(3, 0, 2), (0, 1, 4)], 4: [(2, 0, 3, 1), (0, 2, 1, 2)]}[ranks]
    rest = (0,) * (ranks - 1)
    cuts = [((rows,), seq) for rows, seq in zip((2, 3), (*uneven, *uneven), strict=False)]
    cuts += [((2,), (2,) * ranks), ((2,), (*rest, 5)), (uneven[0], (3,))]
    cuts += [((2,), (*rest, 0)), ((1,), (*rest, 1)), ((1,), (2, *rest)), ((2,), (1, *rest))]
    if ranks == 4:
        cuts += [((2, 1), (3, 2)), ((0, 2), (1, 3)), ((1, 2), (2, 0))]
    return [Layout(batch=batch, seq=seq, order=order) for batch, seq in cuts for order in ("BL", "LB")]
