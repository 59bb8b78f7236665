"""The MoE layer as one module."""

from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layout.partition import Partition
from ..layout.sharding import TokenSharding
from ..plan.checks import check_plan
from ..plan.counted import DispatchMetadata, plan_dispatch, refuse_plan
from ..rows.dispatch import combine, start_dispatch
from ..wire.exchange import check_group
from ..wire.group_copy import copy_in_group
from .balance import sum_counts
from .experts import GroupedExperts
from .recompute import ForwardMemory, in_backward
from .router import TopKRouter


class MoE(nn.Module):
    """Router, dispatch, this rank's experts, combine and shared experts, to drop into a transformer block.

    Args:
        router: over all E experts; the same on every rank.
        experts: this rank's share of them.
        partition: which rank of ``group`` holds which experts.
        group: the expert-parallel process group.
        shared: experts that every token goes to, as one module (..., D) -> (..., D), e.g. :class:`SwiGLU`. They
            compute while rows are on their way to the routed experts, in forward and in backward.

    Attributes:
        load_E: choices that fell on each expert from this rank's tokens since :meth:`update_bias`; counted in
            training mode, once per forward (a recomputation does not count), and not part of the state dict. It is a
            buffer: pass ``broadcast_buffers=False`` to DistributedDataParallel, which would overwrite the counts.

    Gradients: each rank's loss counts its own tokens; the gradient of a parameter that several ranks hold is the
    *sum* of theirs. Experts need no reduction over ``group``: all of their rows came here.

    Raises:
        ValueError: experts that are not what the partition gives this rank, or a router over another number of
            experts.
    """

    def __init__(
        self,
        *,
        router: TopKRouter,
        experts: GroupedExperts,
        partition: Partition,
        group: dist.ProcessGroup,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_group(group, len(partition), "the partition of experts")
        check_plan(router.dim, TokenSharding(batch=1, seq=Partition.balanced(0, len(partition))), partition, group)
        mine = partition.sizes[group.rank()]
        if router.num_experts != partition.total or experts.num_experts != mine:
            raise ValueError(
                f"a router over {router.num_experts} experts and {experts.num_experts} experts on rank "
                f"{group.rank()}, but {partition} has {partition.total} experts, {mine} of them here; build both "
                "from the partition"
            )
        self.router, self.experts, self.partition, self.group = router, experts, partition, group
        self.shared = shared
        self.load_E: Tensor
        self.register_buffer("load_E", torch.zeros(partition.total, dtype=torch.int64), persistent=False)
        self._plans: ForwardMemory[DispatchMetadata] = ForwardMemory()

    def forward(self, x_BlD: Tensor, *, sharding: TokenSharding) -> tuple[Tensor, Tensor]:
        """The layer's output and the router's scores.

        Three collectives forward and two backward. Inside ``torch.utils.checkpoint(use_reentrant=False)`` the
        recomputation takes the plan of its forward: tokens are routed once. A reentrant one, or one with other
        saved-tensor hooks around the layer, routes them again.

        Args:
            x_BlD: (b, l, D), or (l, b, D), this rank's tokens.
            sharding: the tokens that the group holds.

        Returns:
            ``y_BlD``, like ``x_BlD``, and ``scores_BlE``, from which :func:`sequence_balance_loss` makes its loss.

        Raises:
            ValueError: the same on every rank of the group, naming the rank at fault: an ``x_BlD`` of the wrong shape
                or dtype, a NaN in the routing weights, ranks that disagree about the sharding or about what needs a
                gradient.
        """
        problem = self._problem(x_BlD, sharding)
        if problem:
            refuse_plan(
                problem,
                num_choices=self.router.top_k,
                device=x_BlD.device,
                dim=self.router.dim,
                sharding=sharding,
                experts=self.partition,
                group=self.group,
            )
        scores_BlE = self.router(x_BlD)
        # A rank that takes no part in backward would leave its peers waiting there.
        of_rows = torch.is_grad_enabled() and (x_BlD.requires_grad or scores_BlE.requires_grad)
        of_experts = torch.is_grad_enabled() and any(w.requires_grad for w in self.experts.parameters())
        also = f"gradients of tokens or weights {of_rows}, of experts {of_experts}"
        metadata = self._plans.recall(lambda: self._plan(scores_BlE.detach(), x_BlD.dtype, sharding, also))
        weight_BlK = self.router.weigh(scores_BlE, metadata.expert_BlK)
        rows = start_dispatch(x_BlD, weight_BlK, metadata)
        shared_BlD = None if self.shared is None else self.shared(x_BlD)  # while the rows are on their way
        x_MD, weight_M = rows.finish()
        y_BlD = combine(self.experts(x_MD, metadata.rows_per_expert_e, weight_M), metadata)
        return y_BlD if shared_BlD is None else y_BlD + shared_BlD, scores_BlE

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy in the same process group."""
        return copy_in_group(self, memo)

    @torch.no_grad()
    def update_bias(self, rate: float, group: dist.ProcessGroup) -> None:
        """Move the router's bias by the load since the last call, then count from 0. Call it once per optimizer step.

        Args:
            rate: see :meth:`TopKRouter.update_bias`.
            group: all ranks whose tokens train this layer (data, sequence and tensor-parallel shards). One
                all-reduce.
        """
        sum_counts(self.load_E, group)
        self.router.update_bias(self.load_E, rate)
        self.load_E.zero_()

    def _plan(self, scores_BlE: Tensor, dtype: torch.dtype, sharding: TokenSharding, also: str) -> DispatchMetadata:
        expert_BlK = self.router.choose(scores_BlE)
        metadata = plan_dispatch(
            expert_BlK,
            dim=self.router.dim,
            sharding=sharding,
            experts=self.partition,
            group=self.group,
            weight_BlK=self.router.weigh(scores_BlE, expert_BlK),
            dtype=dtype,
            also=also,
        )
        if self.training and not in_backward():
            count_E1 = self.load_E.new_zeros(len(self.load_E) + 1)  # first those of "no expert", id -1
            count_E1.scatter_add_(0, expert_BlK.flatten() + 1, torch.ones_like(expert_BlK).flatten())
            self.load_E += count_E1[1:]
        return metadata

    def _problem(self, x_BlD: Tensor, sharding: TokenSharding) -> str:
        check_plan(self.router.dim, sharding, self.partition, self.group)
        shape = (*sharding.local_shape(self.group.rank()), self.router.dim)
        if tuple(x_BlD.shape) == shape and x_BlD.is_floating_point():
            return ""
        return (
            f"x is {tuple(x_BlD.shape)} of {x_BlD.dtype}; its shard in order {sharding.order!r} is {shape}, of a "
            "floating-point dtype: pass the tokens that the sharding gives this rank"
        )
