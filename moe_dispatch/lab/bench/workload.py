"""What every contender is given: the facts of a workload, and each rank's tensors, the same in every run."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import Partition, TokenSharding
from .config import DispatchConfig, UlyssesConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One rank's tensors, and what has to come out of them, in float64.

    Attributes:
        inputs: in the order of ``forward``.
        leaves: those of them that take a gradient.
        grad_out: gradient of the output.
        out, grads: the right output, and the right gradient of each leaf.
    """

    inputs: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    grad_out: Tensor
    out: Tensor
    grads: tuple[Tensor, ...]


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
