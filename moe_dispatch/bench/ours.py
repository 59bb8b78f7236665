"""This library, as a user calls it."""

import torch.distributed as dist
from torch import Tensor

from sp_attention import ulysses_attention

from .. import combine, dispatch, plan_dispatch
from .workload import DispatchWorkload, UlyssesWorkload, add_heads


class OurDispatch:
    """``plan_dispatch``, ``dispatch``, identity experts, ``combine``."""

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
        return combine(x_MD, plan, weight_M).squeeze(0)


class OurUlysses:
    """``ulysses_attention`` around :func:`add_heads`."""

    def __init__(self, workload: UlyssesWorkload, group: dist.ProcessGroup) -> None:
        self.workload, self.group = workload, group

    def forward(self, q_BlNH: Tensor, k_BlGH: Tensor, v_BlGH: Tensor) -> Tensor:
        return ulysses_attention(
            q_BlNH, k_BlGH, v_BlGH, sharding=self.workload.sharding, group=self.group, attend=add_heads
        )
