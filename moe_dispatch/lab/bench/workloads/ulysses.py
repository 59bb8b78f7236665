"""The exchange of Ulysses around an attention that is a sum."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .... import Partition, TokenSharding
from ..config import UlyssesConfig
from .case import Case


@dataclass(frozen=True, slots=True, kw_only=True)
class UlyssesWorkload:
    """Queries, keys and values to heads, ``q + (k + v)``, and back.

    Attributes:
        sharding: tokens of each rank; the batch is not cut.
        heads: query heads of each rank.
        num_kv, head_dim, dtype: G, H, and the dtype of all three.
    """

    sharding: TokenSharding
    heads: Partition
    num_kv: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: UlyssesConfig) -> "UlyssesWorkload":
        return cls(
            sharding=TokenSharding(batch=config.batch, seq=Partition(config.lengths)),
            heads=Partition.balanced(config.heads, config.ranks),
            num_kv=config.kv_heads,
            head_dim=config.head_dim,
            dtype=getattr(torch, config.dtype),
        )

    @property
    def kind(self) -> str:
        return "ulysses"

    @property
    def kv_needed(self) -> tuple[int, ...]:
        """How many key/value heads the query heads of each rank need."""
        per_group = self.heads.total // self.num_kv
        return tuple(
            len({head // per_group for head in range(start, start + size)})
            for start, size in zip(self.heads.offsets, self.heads.sizes, strict=True)
        )

    def case(self, rank: int) -> Case:
        generator = torch.Generator().manual_seed(2000 + rank)
        shape, dtype = self.sharding.local_shape(rank), self.dtype
        q_BlNH, k_BlGH, v_BlGH = (
            torch.randn(*shape, heads, self.head_dim, generator=generator).to(dtype).requires_grad_()
            for heads in (self.heads.total, self.num_kv, self.num_kv)
        )
        grad_BlNH = torch.randn(q_BlNH.shape, generator=generator).to(dtype)
        with torch.no_grad():
            grad = grad_BlNH.double()
            grad_kv = grad.unflatten(2, (self.num_kv, -1)).sum(3)
            out = add_heads(q_BlNH.double(), k_BlGH.double(), v_BlGH.double())
        return Case(
            inputs=(q_BlNH, k_BlGH, v_BlGH),
            leaves=(q_BlNH, k_BlGH, v_BlGH),
            grad_out=grad_BlNH,
            out=out,
            grads=(grad, grad_kv, grad_kv),
        )


def add_heads(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> Tensor:
    """``q + (k + v)``, each key/value head for its group of query heads: the least that an attention can do."""
    kv_BLgH = k_BLgH + v_BLgH
    if kv_BLgH.shape == q_BLnH.shape:
        return q_BLnH + kv_BLgH
    return (q_BLnH.unflatten(2, (kv_BLgH.shape[2], -1)) + kv_BLgH.unsqueeze(3)).flatten(2, 3)
