"""One call of one rank: its share of the work, and what was asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor

from ..blocks.tile import Options
from ..work.plan import RankWork
from .moves import Moves
from .source import Source


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spread:
    """A call, but for its tensors.

    Attributes:
        mine: the work of this rank.
        group: the ranks that share the work.
        options: of this rank's heads; the mask comes beside the tensors.
        value_width: Hv.
        source: of weights, and whether each wants a gradient -> what makes keys and values of what travels for them.
    """

    mine: RankWork
    group: dist.ProcessGroup
    options: Options
    value_width: int
    source: Callable[[Sequence[Tensor], Sequence[bool]], Source]

    @property
    def moves(self) -> Moves:
        return Moves(self.mine, self.group)

    @property
    def my_heads(self) -> tuple[int, int]:
        """The first query head of this rank, and how many."""
        return self.mine.work.query_heads(self.mine.rank)

    def options_with(self, attn_mask: Tensor | None) -> Options:
        return replace(self.options, attn_mask=self.of_my_heads(attn_mask))

    def of_my_heads(self, mask_BNLL: Tensor | None) -> Tensor | None:
        """The view that this rank's heads need of a mask, or of its gradient."""
        if mask_BNLL is None or mask_BNLL.shape[1] == 1:
            return mask_BNLL
        return mask_BNLL.narrow(1, *self.my_heads)

    def per_query(self, kv: Sequence[Tensor]) -> list[Tensor]:
        """Keys and values as the kernels need them: whole groups of query heads, or a head for each query head."""
        heads, rank = self.mine.work.heads, self.mine.head_rank
        return [heads.kv_for_queries(x_BLgH, rank) for x_BLgH in kv]

    def my_sinks(self, sinks_N: Tensor | None) -> Tensor | None:
        return None if sinks_N is None else sinks_N.narrow(0, *self.my_heads)


def can_attend(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> bool:
    """Whether there is a query, a head and a key: a kernel without ends the process."""
    return bool(q_BLnH.numel() and k_BLgH.numel() and v_BLgH.numel())
