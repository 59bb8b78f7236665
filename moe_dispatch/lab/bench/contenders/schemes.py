"""This library's attention over ranks, as a user calls it."""

import torch.distributed as dist
from torch import Tensor

from sp_attention import Scheme, attention_over_ranks

from ..workloads.attention import AttentionWorkload, Order
from .protocol import NotApplicable


class OurAttention:
    """``attention_over_ranks`` by this scheme, of tokens in this order."""

    def __init__(
        self, workload: AttentionWorkload, group: dist.ProcessGroup, *, scheme: Scheme, order: Order
    ) -> None:
        try:
            scheme.team_size(group.size())
        except ValueError as error:
            raise NotApplicable(str(error)) from None
        self.sharding, self.scheme = workload.in_order(order), scheme
        self.options, self.group = workload.options, group

    def forward(self, q_BlNH: Tensor, k_BlGH: Tensor, v_BlGH: Tensor) -> Tensor:
        return attention_over_ranks(
            q_BlNH, k_BlGH, v_BlGH, sharding=self.sharding, group=self.group, scheme=self.scheme, **self.options
        )
