"""Causal attention that is computed, of sequences that are spread over ranks."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from .... import Partition, TokenSharding
from ..config import AttentionConfig
from .case import Case

Order = Literal["contiguous", "zigzag"]


@dataclass(frozen=True, kw_only=True)
class AttentionWorkload:
    """Causal attention. A contender chooses which tokens each rank holds: its ``sharding``.

    Attributes:
        sharding: contiguous shards.
        heads: query heads of each rank, for those that cut heads.
        num_kv, head_dim, dtype: G, H, and the dtype of queries, keys and values.
        window: how many keys before its own a query sees; -1 for all.
    """

    sharding: TokenSharding
    heads: Partition
    num_kv: int
    head_dim: int
    dtype: torch.dtype
    window: int

    @classmethod
    def of(cls, config: AttentionConfig) -> "AttentionWorkload":
        return cls(
            sharding=TokenSharding(batch=config.batch, seq=Partition(config.lengths)),
            heads=Partition.balanced(config.heads, config.ranks),
            num_kv=config.kv_heads,
            head_dim=config.head_dim,
            dtype=getattr(torch, config.dtype),
            window=config.window,
        )

    @property
    def kind(self) -> str:
        return "attention"

    def in_order(self, order: Order) -> TokenSharding:
        """Which tokens each rank holds: contiguous ones, or an early and a late piece, so that all have as much to
        do."""
        batch, length, ranks = self.sharding.batch.total, self.sharding.seq.total, self.sharding.num_ranks
        return TokenSharding.zigzag(batch=batch, length=length, ranks=ranks) if order == "zigzag" else self.sharding

    @property
    def options(self) -> dict[str, Any]:
        """What our attention is told."""
        return {"is_causal": True} if self.window < 0 else {"is_causal": True, "window": (self.window, -1)}

    @cached_property
    def whole(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_BLNH, k_BLGH, v_BLGH and the gradient of the output: of every token, the same on every rank."""
        generator, shape = torch.Generator().manual_seed(3000), self.sharding.global_shape
        heads = (self.heads.total, self.num_kv, self.num_kv, self.heads.total)
        q, k, v, grad = (torch.randn(*shape, n, self.head_dim, generator=generator).to(self.dtype) for n in heads)
        return q, k, v, grad

    def case(self, rank: int, sharding: TokenSharding, exact: tuple[Tensor, ...]) -> Case:
        """What ``rank`` holds of the whole tensors, and of what :func:`exact_attention` made of them."""
        *inputs, grad_out = (sharding.shard(x, rank).clone() for x in self.whole)
        q_BlNH, k_BlGH, v_BlGH = (x.requires_grad_() for x in inputs)
        out, *grads = (sharding.shard(x, rank).clone() for x in exact)
        leaves = (q_BlNH, k_BlGH, v_BlGH)
        return Case(inputs=leaves, leaves=leaves, grad_out=grad_out, out=out, grads=tuple(grads))
