"""This library, as a user calls it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sp_attention import ulysses_attention

from .... import DispatchMetadata, combine, dispatch, plan_dispatch
from ....rows.sums import dot_rows, weigh_rows
from ..workloads.dispatch import DispatchWorkload
from ..workloads.ulysses import UlyssesWorkload, add_heads


class OurDispatch:
    """``plan_dispatch``, ``dispatch``, identity experts, ``combine``, which multiplies by the weights."""

    experts_keep: tuple[Tensor, ...] = ()

    def __init__(self, workload: DispatchWorkload, group: dist.ProcessGroup) -> None:
        self.workload, self.group = workload, group

    def forward(self, x_tD: Tensor, expert_tK: Tensor, weight_tK: Tensor) -> Tensor:
        x_BlD, weight_BlK = x_tD.unsqueeze(0), weight_tK.unsqueeze(0)
        plan = plan_dispatch(
            expert_tK.unsqueeze(0),
            dim=x_tD.shape[1],
            sharding=self.workload.sharding,
            experts=self.workload.experts,
            group=self.group,
            weight_BlK=weight_BlK,
            dtype=x_tD.dtype,
        )
        x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
        return self.experts_and_combine(x_MD, weight_M, plan).squeeze(0)

    def experts_and_combine(self, x_MD: Tensor, weight_M: Tensor, plan: DispatchMetadata) -> Tensor:
        return combine(x_MD, plan, weight_M)


class OurDispatchWeighedByExperts(OurDispatch):
    """The same, with experts that multiply by the weights, as ``GroupedExperts`` do."""

    def experts_and_combine(self, x_MD: Tensor, weight_M: Tensor, plan: DispatchMetadata) -> Tensor:
        self.experts_keep = (x_MD, weight_M)  # as any expert keeps its input: not the dispatcher's doing
        return combine(_WeighingExperts.apply(x_MD, weight_M), plan)  # type: ignore[arg-type]


class _WeighingExperts(torch.autograd.Function):
    """forward   y_MD = weight_M * x_MD
    backward  d x_MD = weight_M * d y_MD, d weight_M = <x_MD, d y_MD>
    """

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_M: Tensor) -> Tensor:
        ctx.save_for_backward(x_MD, weight_M)
        return weigh_rows(x_MD, weight_M, torch.arange(len(x_MD)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_MD, weight_M = ctx.saved_tensors
        row_M = torch.arange(len(x_MD))
        return weigh_rows(grads[0], weight_M, row_M), dot_rows(x_MD, grads[0], row_M).to(weight_M.dtype)


class OurUlysses:
    """``ulysses_attention`` around :func:`add_heads`."""

    def __init__(self, workload: UlyssesWorkload, group: dist.ProcessGroup) -> None:
        self.workload, self.group = workload, group

    def forward(self, q_BlNH: Tensor, k_BlGH: Tensor, v_BlGH: Tensor) -> Tensor:
        return ulysses_attention(
            q_BlNH, k_BlGH, v_BlGH, sharding=self.workload.sharding, group=self.group, attend=add_heads
        )
