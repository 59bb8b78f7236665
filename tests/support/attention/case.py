"""One call of the attention over ranks: its sizes, and the kind of its mask."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from tests.support.tensors import Order

Options = dict[str, Any]
Attend = Callable[..., Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call. ``kind`` names its mask: a key of KINDS."""

    ranks: int
    kind: str
    batch: int
    seq: tuple[int, ...]
    kv_seq: tuple[int, ...]
    num_heads: tuple[int, int]
    widths: tuple[int, int]
    order: Order = "BL"
    heads: tuple[int, ...] | None = None
    scale: float | None = None
    seed: int = 0

    @property
    def lengths(self) -> tuple[int, int]:
        return sum(self.seq), sum(self.kv_seq)

    @property
    def head_sizes(self) -> tuple[int, ...]:
        return self.heads or tuple(len(range(rank, self.num_heads[0], self.ranks)) for rank in range(self.ranks))

    @property
    def shares_a_kv_head(self) -> bool:
        """Do two ranks hold query heads of one key/value head?"""
        per_group = self.num_heads[0] // self.num_heads[1]
        ends = list(accumulate(self.head_sizes))[:-1]
        return any(end % per_group for end in ends if 0 < end < self.num_heads[0])


def named_case(
    ranks: int,
    kind: str,
    seq: tuple[int, ...],
    *,
    batch: int = 2,
    num_heads: tuple[int, int] = (4, 4),
    widths: tuple[int, int] = (6, 6),
    kv_seq: tuple[int, ...] | None = None,
    order: Order = "BL",
    scale: float | None = None,
) -> Case:
    return Case(
        ranks=ranks,
        kind=kind,
        batch=batch,
        seq=seq,
        kv_seq=kv_seq or seq,
        num_heads=num_heads,
        widths=widths,
        order=order,
        scale=scale,
        seed=7,
    )
