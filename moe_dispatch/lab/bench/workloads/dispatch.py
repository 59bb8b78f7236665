"""Tokens through identity experts and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .... import Partition, TokenSharding
from ..config import DispatchConfig
from .case import Case


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchWorkload:
    """Tokens through identity experts and back.

    Attributes:
        sharding: tokens of each rank, B = 1.
        experts: experts of each rank.
        dim, top_k, dtype: width D of a row, choices K of a token, dtype of the rows; weights are float32.
        zipf: 0 for uniform routing; else expert e is chosen with weight (e + 1) ** -zipf.
    """

    sharding: TokenSharding
    experts: Partition
    dim: int
    top_k: int
    dtype: torch.dtype
    zipf: float

    @classmethod
    def of(cls, config: DispatchConfig) -> "DispatchWorkload":
        return cls(
            sharding=TokenSharding(batch=1, seq=Partition(config.tokens_per_rank)),
            experts=Partition.balanced(config.experts, config.ranks),
            dim=config.dim,
            top_k=config.top_k,
            dtype=getattr(torch, config.dtype),
            zipf=config.zipf,
        )

    @property
    def kind(self) -> str:
        return "dispatch"

    def choices(self, rank: int) -> Tensor:
        """(t, K) int64: K different experts for each token of ``rank``."""
        generator = torch.Generator().manual_seed(rank)
        log_odds_E = -self.zipf * torch.arange(1, self.experts.total + 1).log()
        uniform_tE = torch.rand(self.sharding.local_sizes[rank], self.experts.total, generator=generator)
        gumbel_tE = -(-uniform_tE.clamp_min(1e-20).log()).log()
        return (log_odds_E + gumbel_tE).topk(self.top_k, dim=1).indices

    def case(self, rank: int) -> Case:
        """Weights do not sum to 1, so that rows which come back unweighted show."""
        generator = torch.Generator().manual_seed(1000 + rank)
        tokens = self.sharding.local_sizes[rank]
        x_tD = torch.randn(tokens, self.dim, generator=generator).to(self.dtype).requires_grad_()
        weight_tK = (torch.rand(tokens, self.top_k, generator=generator) + 0.1).requires_grad_()
        grad_tD = torch.randn(tokens, self.dim, generator=generator).to(self.dtype)
        with torch.no_grad():
            x, grad, total_t1 = x_tD.double(), grad_tD.double(), weight_tK.double().sum(1, keepdim=True)
            out, grad_x = x * total_t1, grad * total_t1
            grad_weight = (grad * x).sum(1, keepdim=True).expand(-1, self.top_k)
        return Case(
            inputs=(x_tD, self.choices(rank), weight_tK),
            leaves=(x_tD, weight_tK),
            grad_out=grad_tD,
            out=out,
            grads=(grad_x, grad_weight),
        )
