"""Contenders for the tests of `bench`, right and wrong, as `--adapter tests.support.lab.adapters:NAME` finds them."""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import TokenSharding
from moe_dispatch.lab.bench.contenders.ours import OurDispatch
from moe_dispatch.lab.bench.contenders.protocol import NotApplicable
from moe_dispatch.lab.bench.workloads.attention import AttentionWorkload
from moe_dispatch.lab.bench.workloads.ulysses import UlyssesWorkload
from sp_attention import ulysses_attention

NO_CLASS = "a string"


class Careful(OurDispatch):
    """A good one, of another name."""


class CarefulUlysses:
    kind = "ulysses"

    def __init__(self, workload: UlyssesWorkload, group: dist.ProcessGroup) -> None:
        raise NotApplicable("does nothing at all")

    def forward(self) -> None: ...


class Unweighted(OurDispatch):
    def forward(self, x_tD: Tensor, expert_tK: Tensor, weight_tK: Tensor) -> Tensor:
        return super().forward(x_tD, expert_tK, torch.ones_like(weight_tK) + 0 * weight_tK)


class WithoutGradientOfWeights(OurDispatch):
    def forward(self, x_tD: Tensor, expert_tK: Tensor, weight_tK: Tensor) -> Tensor:
        return super().forward(x_tD, expert_tK, weight_tK.detach() + 0 * weight_tK)


class WrongOnTheLastRank(OurDispatch):
    def forward(self, x_tD: Tensor, expert_tK: Tensor, weight_tK: Tensor) -> Tensor:
        return super().forward(x_tD, expert_tK, weight_tK) * (1 + 0.5 * self.group.rank())


class OfAnotherShape(OurDispatch):
    def forward(self, x_tD: Tensor, expert_tK: Tensor, weight_tK: Tensor) -> Tensor:
        return super().forward(x_tD, expert_tK, weight_tK).unsqueeze(0)


class Raises(OurDispatch):
    def forward(self, x_tD: Tensor, expert_tK: Tensor, weight_tK: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")


class Attention:
    kind = "attention"

    def __init__(self, workload: AttentionWorkload, group: dist.ProcessGroup) -> None:
        self.workload, self.group = workload, group

    def forward(self, q_BlNH: Tensor, k_BlGH: Tensor, v_BlGH: Tensor) -> Tensor:
        """Without a ``sharding`` of its own it gets contiguous tokens."""
        sharding = self.workload.sharding
        return ulysses_attention(q_BlNH, k_BlGH, v_BlGH, sharding=sharding, group=self.group, is_causal=True)


class TakesZigzagForContiguous(Attention):
    @property
    def sharding(self) -> TokenSharding:
        return self.workload.in_order("zigzag")


class Odd:
    kind = "attentive"

    def forward(self) -> None: ...
