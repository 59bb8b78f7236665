"""Contenders for the tests of `bench`, right and wrong, as `--adapter tests.support.lab.adapters:NAME` finds them."""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch.lab.bench.contenders.ours import OurDispatch
from moe_dispatch.lab.bench.contenders.protocol import NotApplicable
from moe_dispatch.lab.bench.workload import UlyssesWorkload

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


class Odd:
    kind = "attention"

    def forward(self) -> None: ...
