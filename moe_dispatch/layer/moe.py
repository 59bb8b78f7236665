"""The MoE layer as one module."""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layout.partition import Partition
from ..layout.sharding import TokenSharding
from ..plan.counted import Counted
from ..plan.planner import Plan, Planner
from ..plan.terms import Terms, check_experts
from ..routing.sites import Site, Tap
from ..rows.combine import combine
from ..rows.dispatch import start_dispatch
from ..wire.devices import device_for
from ..wire.exchange import check_group
from ..wire.group_copy import copy_in_group, state_without_group
from ..wire.policies import unseen_by_policies
from ..wire.uncompiled import uncompiled
from .balance import sum_counts
from .experts import GroupedExperts
from .given import Given
from .passed_on import passed_on
from .recompute import ForwardMemory, ReentrantMemory, in_backward
from .router import TopKRouter
from .training_pass import only_learns_shapes
from .wrapped import check_not_averaged, is_sharded

COUNTED = Counted()


class MoE(nn.Module):
    """Router, dispatch, this rank's experts, combine and shared experts, to drop into a transformer block.

    Args:
        router: over all E experts; the same on every rank.
        experts: this rank's share of them.
        partition: which rank of ``group`` holds which experts.
        group: the expert-parallel process group.
        shared: experts that every token goes to, as one module (..., D) -> (..., D), e.g. :class:`SwiGLU`. They
            compute while rows are on their way to the routed experts, in forward and in backward.
        planner: the kind of plan: ``Counted()``, a :class:`StaticSizes` (no host sync, fixed sizes), or a
            :class:`NodeGroups` (between nodes first, then within; ``group`` has the ranks of all nodes, node after
            node).

    Attributes:
        load_E: choices that fell on each expert from this rank's tokens since :meth:`update_bias`; counted in
            training mode with gradients, once per forward (a recomputation does not count). A buffer that is no part
            of the state dict; it starts at 0 on the device of the tokens, also after construction on "meta".
        report: what :meth:`check` reads; a buffer that is no part of the state dict either.

    Gradients: each rank's loss counts its own tokens; the gradient of a parameter that several ranks hold is the
    *sum* of theirs. Experts need no reduction over ``group``: all of their rows came here.

    Raises:
        ValueError: experts that are not what the partition gives this rank, a router over another number of experts,
            or a planner for other ranks.
    """

    def __init__(
        self,
        *,
        router: TopKRouter,
        experts: GroupedExperts,
        partition: Partition,
        group: dist.ProcessGroup,
        shared: nn.Module | None = None,
        planner: Planner = COUNTED,
    ) -> None:
        super().__init__()
        check_group(group, len(partition), "the partition of experts")
        check_experts(partition)
        planner.check_group(partition, group)
        mine = partition.sizes[group.rank()]
        if router.num_experts != partition.total or experts.num_experts != mine:
            raise ValueError(
                f"a router over {router.num_experts} experts and {experts.num_experts} experts on rank "
                f"{group.rank()}, but {partition} has {partition.total} experts, {mine} of them here; build both "
                "from the partition"
            )
        self.router, self.experts, self.partition, self.group = router, experts, partition, group
        self.shared, self.planner = shared, planner
        self.load_E: Tensor
        self.register_buffer("load_E", torch.zeros(partition.total, dtype=torch.int64), persistent=False)
        self.report: Tensor
        self.register_buffer("report", planner.new_report(len(partition)), persistent=False)
        self._plans: ForwardMemory[Plan] = ForwardMemory()
        self._chosen: ReentrantMemory[Tensor] = ReentrantMemory()
        self._tap = Tap()

    @uncompiled("the rows of each batch would be another graph; compile what is around MoE layers")
    def forward(
        self,
        x_BlD: Tensor,
        *,
        sharding: TokenSharding,
        real_Bl: Tensor | None = None,
        expert_BlK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The layer's output and the router's scores.

        Three collectives forward and two backward; six and four with :class:`NodeGroups`. Inside
        ``torch.utils.checkpoint(use_reentrant=False)`` the recomputation takes the plan of its forward: tokens are
        routed once. A reentrant one plans again, with the experts of its forward. One with other saved-tensor hooks
        around the layer routes them again.

        Args:
            x_BlD: (b, l, D), or (l, b, D), this rank's tokens.
            sharding: the tokens that the group holds.
            real_Bl: (b, l), or (l, b), bool, False at padding, e.g. ``batch.real_Bl``; all are real if left out.
                Padding may hold anything, NaN too. It goes to no expert, counts nowhere, has output and scores 0, and
                its gradient is 0.
            expert_BlK: (b, l, K), or (l, b, K), int64 or int32: the experts of each token, decided elsewhere (to
                replay the routing of an inference engine, say); the router's choice if left out. -1 means no expert.
                Their weights are those of the router's scores.

        Returns:
            ``y_BlD``, like ``x_BlD``, and ``scores_BlE``, from which :func:`sequence_balance_loss` makes its loss.

        Raises:
            ValueError: the same on every rank of the group, naming the rank at fault: tensors of the wrong shape or
                dtype, ids outside the experts, a NaN in the routing weights, ranks that disagree about the sharding
                or about what needs a gradient.
        """
        check_not_averaged(self.experts, self.group)  # all ranks see it, so none of them is in a collective
        given = Given(x_BlD=x_BlD, sharding=sharding, real_Bl=real_Bl, expert_BlK=expert_BlK)
        self._check(given)
        self._leave_meta(x_BlD.device)
        x_BlD = given.real(x_BlD)
        scores_BlE = self.router(x_BlD)
        # A rank that takes no part in backward would leave its peers waiting there. Gradients of tokens or weights
        # pass through all experts: so experts may learn on some ranks only.
        of_rows = torch.is_grad_enabled() and (x_BlD.requires_grad or scores_BlE.requires_grad)
        of_any = of_rows or (torch.is_grad_enabled() and any(w.requires_grad for w in self.experts.parameters()))
        also = f"gradients of tokens or weights {of_rows}, of these or experts {of_any}"
        terms = self._terms(sharding, x_BlD.dtype, also)
        plan = self._plans.recall(lambda: self._plan(scores_BlE.detach(), given, terms))
        weight_BlK = self.router.weigh(scores_BlE, plan.expert_BlK)
        rows = start_dispatch(x_BlD, weight_BlK, plan)
        shared_BlD = None if self.shared is None else self.shared(x_BlD)  # while the rows are on their way
        x_MD, weight_M = rows.finish()
        y_MD = self.experts(x_MD, plan.rows_per_expert_e, weight_M)
        y_BlD = combine(passed_on(y_MD, weight_M) if of_any else y_MD, plan)
        y_BlD = y_BlD if shared_BlD is None else y_BlD + shared_BlD
        return given.real(y_BlD), given.real(scores_BlE)

    def check(self) -> None:
        """Raise if a plan since the last call was wrong in a way that only the device knew: sizes of a
        :class:`StaticSizes` that were too small, or what one rank had wrong. Outputs were NaN then. It waits for the
        device: call it once per step, outside of what a CUDA graph captures. Other planners raise while they plan.

        Raises:
            StaticSizesError: on every rank of the group, with the same text.
        """
        report = self.report.clone()
        self.report.zero_()
        self.planner.check_report(report)

    def reset_parameters(self) -> None:
        """Count from 0. The router and the experts have their own."""
        for buffer in (self.load_E, self.report):
            buffer.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Buffers that leave "meta" start at 0: ``to_empty`` fills nothing, and no checkpoint holds them."""
        of_meta = self.load_E.is_meta
        super()._apply(fn, recurse)
        if of_meta and not self.load_E.is_meta:
            self.reset_parameters()
        return self

    def _leave_meta(self, device: torch.device) -> None:
        """``load_state_dict(assign=True)`` leaves on "meta" what is no part of the state."""
        if self.load_E.is_meta and device.type != "meta":
            self.load_E = torch.zeros_like(self.load_E, device=device)
            self.report = torch.zeros_like(self.report, device=device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy in the same process group."""
        return copy_in_group(self, memo)

    def __getstate__(self) -> dict[str, Any]:
        """Without the group, for ``torch.save(module)``: set ``group`` after loading, and the planner if it is
        :class:`NodeGroups`, which no file takes."""
        return state_without_group(self)

    def routing_site(self) -> Site:
        """For :func:`record_routing` and :func:`replay_routing`."""
        return Site(
            tap=self._tap, num_experts=self.partition.total, num_choices=self.router.top_k, groups=(self.group,)
        )

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

    @unseen_by_policies
    def _plan(self, scores_BlE: Tensor, given: Given, terms: Terms) -> Plan:
        expert_BlK = self._chosen.recall(lambda: self._choose(scores_BlE, given, terms))
        in_step = not (self.training and only_learns_shapes())
        # Where a pass only learns shapes, NaN is nobody's mistake.
        in_range_BlK = expert_BlK.clamp(max=self.partition.total - 1)  # the plan refuses others, on every rank
        checked_BlK = self.router.weigh(scores_BlE, in_range_BlK) if in_step else None
        plan = self.planner.plan(expert_BlK, checked_BlK, terms, self.group)
        given.show(self._tap, expert_BlK, self.group.rank())  # planned: every rank has taken the same forward
        plan.add_report(self.report)
        if self.training and in_step and not in_backward():
            count_E1 = self.load_E.new_zeros(len(self.load_E) + 1)  # first those of "no expert", id -1
            count_E1.scatter_add_(0, expert_BlK.flatten() + 1, torch.ones_like(expert_BlK).flatten())
            self.load_E += count_E1[1:]
        return plan

    def _choose(self, scores_BlE: Tensor, given: Given, terms: Terms) -> Tensor:
        """The experts of a forward: given, replayed, or the router's."""
        try:
            return given.or_replayed(self._tap, self.group.rank()).choices(self.router, scores_BlE)
        except ValueError as error:
            device = given.x_BlD.device
            self.planner.refuse(str(error), terms, self.group, num_choices=self.router.top_k, device=device)

    def _terms(self, sharding: TokenSharding, dtype: torch.dtype | None = None, also: str = "") -> Terms:
        return Terms(sharding=sharding, experts=self.partition, dim=self.router.dim, dtype=dtype, also=also)

    def _check(self, given: Given) -> None:
        """Raise on every rank unless the tokens are this rank's shard, and its experts can have gradients."""
        terms = self._terms(given.sharding)
        terms.check(self.group)
        problem = given.problem(self.group, self.router)
        if not problem and not self.experts.num_experts and torch.is_grad_enabled() and is_sharded(self.experts):
            problem = (
                "FSDP2 shards the experts of this rank, which holds none, and cannot reduce gradients without "
                "elements; call fully_shard(experts) only where experts.num_experts is not 0"
            )
        if problem:
            device = device_for([given.x_BlD], self.group)
            self.planner.refuse(problem, terms, self.group, num_choices=self.router.top_k, device=device)
