"""The token dispatcher: what torchtitan's routed experts call before and after their experts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...layer.passed_on import passed_on
from ...layer.recompute import ForwardMemory, ReentrantMemory
from ...layer.training_pass import is_metadata_pass
from ...layout.partition import Partition
from ...layout.sharding import TokenSharding
from ...plan.counted import Counted
from ...plan.metadata import DispatchMetadata
from ...plan.terms import Terms
from ...rows.combine import combine
from ...rows.dispatch import dispatch
from ...wire.policies import unseen_by_policies
from ...wire.token_counts import gather_sharding
from ...wire.uncompiled import uncompiled
from .interface import BaseEPTokenDispatcher, LocalTokenDispatcher, spmd_types

REASON = (
    "moe_dispatch plans by the rows of each batch, which would be another graph each time; compile without "
    "fullgraph=True, or leave MoE layers uncompiled"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sent:
    """What ``combine`` needs of a ``dispatch``.

    Attributes:
        plan: where each row went.
        weight_M: the routing score of each row that came, in the dtype of the router.
    """

    plan: DispatchMetadata
    weight_M: Tensor


class MoEDispatchTokenDispatcher(BaseEPTokenDispatcher):
    """torchtitan's dispatcher slot, over this library: set as ``layer.moe.routed_experts.token_dispatcher``, built by
    its ``Config`` in a model config, or put there by the override
    ``moe_dispatch.integrations.torchtitan.overrides.token_dispatcher``.

    Experts are torchtitan's own, cut evenly over its "ep" mesh. Ranks may hold any numbers of tokens, 0 too. Scores
    weigh the experts' outputs on the token's rank, in float32, and are rounded once. Without an "ep" mesh it is
    torchtitan's local dispatcher.

    Three collectives per layer forward, two backward. One more forward, and a second host sync, where the ranks have
    to tell each other how many tokens they have: use :func:`known_tokens`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseEPTokenDispatcher.Config):
        """The fields of torchtitan's: ``num_experts`` (E) and ``top_k`` (K)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._known: TokenSharding | None = None  # inside of known_tokens
        self._plans: ForwardMemory[DispatchMetadata] = ForwardMemory()
        self._shardings: ReentrantMemory[TokenSharding] = ReentrantMemory()

    @uncompiled(REASON)
    def dispatch(
        self,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> tuple[Tensor, Tensor, Any]:
        """Rows to the ranks of their experts. T is this rank's own number of tokens here, as torchtitan has it.

        Args:
            x_TD: (T, D) tokens.
            topk_scores_TK: (T, K), any floating-point dtype.
            topk_expert_ids_TK: (T, K), global ids.
            num_local_tokens_per_expert_E: (E,); not needed.

        Returns:
            (R, D) rows by expert, in the order of their global tokens; (e,) how many each of this rank's experts
            has; and what :meth:`combine` needs.

        Raises:
            GroupError: on every rank: ids out of range, NaN scores, or other tokens than :func:`known_tokens` was
                given.
            ValueError: torchtitan's SPMD type checking is on, which cannot see what moves rows here.
        """
        if self.ep_mesh is None:
            return LocalTokenDispatcher.dispatch(
                self, x_TD, topk_scores_TK, topk_expert_ids_TK, num_local_tokens_per_expert_E
            )
        if spmd_types.is_type_checking():
            raise ValueError(
                "SPMD type checking is on, and cannot see the exchange of moe_dispatch; set "
                "debug.spmd_typechecking=False, or check types with torchtitan's own dispatcher"
            )
        plan = self._plans.recall(lambda: self._plan(x_TD, topk_scores_TK, topk_expert_ids_TK))
        shape = plan.local_shape[:2]
        x_MD, weight_M = dispatch(x_TD.unflatten(0, shape), topk_scores_TK.unflatten(0, shape), plan)
        return x_MD, plan.rows_per_expert_e, Sent(plan=plan, weight_M=weight_M)

    @uncompiled(REASON)
    def combine(self, routed_output_RD: Tensor, metadata: Any, x_TD: Tensor) -> Tensor:
        """Rows back to their tokens, weighed and added up: (R, D) -> (T, D), in the dtype of the rows."""
        if self.ep_mesh is None:
            return LocalTokenDispatcher.combine(self, routed_output_RD, metadata, x_TD)
        if torch.is_grad_enabled():
            routed_output_RD = passed_on(routed_output_RD, metadata.weight_M)
        return combine(routed_output_RD, metadata.plan, metadata.weight_M).flatten(0, 1)

    @unseen_by_policies
    def _plan(self, x_TD: Tensor, score_TK: Tensor, expert_TK: Tensor) -> DispatchMetadata:
        group = self.ep_mesh.get_group()  # pyright: ignore[reportOptionalMemberAccess]
        sharding = self._shardings.recall(
            lambda: self._known or gather_sharding(len(x_TD), device=x_TD.device, group=group)
        )
        of_rows = torch.is_grad_enabled() and (x_TD.requires_grad or score_TK.requires_grad)
        terms = Terms(
            sharding=sharding,
            experts=Partition.even(self.num_experts, group.size()),
            dim=x_TD.shape[1],
            dtype=x_TD.dtype,
            also=f"gradients of tokens or scores {of_rows}, scores of {score_TK.dtype}",
        )
        terms.check(group)
        shape = sharding.local_shape(group.rank())
        if problem := _problem(x_TD, shape):
            Counted().refuse(problem, terms, group, num_choices=self.top_k, device=x_TD.device)
        # Where pipelining only learns shapes, NaN is nobody's mistake.
        checked = None if is_metadata_pass() else score_TK.detach().unflatten(0, shape)
        return Counted().plan(expert_TK.unflatten(0, shape), checked, terms, group)


def _problem(x_TD: Tensor, shape: tuple[int, int]) -> str:
    rows, length = shape
    if len(x_TD) == rows * length:
        return ""
    return (
        f"{len(x_TD)} tokens came to the dispatcher, but the sharding that known_tokens was given has "
        f"{rows} x {length} here; give the one of this batch"
    )


@contextmanager
def known_tokens(sharding: TokenSharding, *models: nn.Module) -> Iterator[None]:
    """In here, the dispatchers of ``models`` know which tokens each rank holds, and do not ask.

    That saves a collective and a host sync in every layer. Experts then see their rows in the order of the grid, as
    one process would, so gradients of experts have the bits of one process also where a rank holds pieces of several
    sequences. Backward may run outside: a recomputation takes the plan, or the tokens, of its forward.

    Args:
        sharding: the tokens of the "ep" group, in its order: (B, L) in order "BL", any sizes;
            :func:`even_sharding` makes that of torchtitan's own batches.
        models: with :class:`MoEDispatchTokenDispatcher` in them, e.g. the parts of a pipeline on this rank.

    Raises:
        ValueError: models without such a dispatcher, or a sharding in order "LB".
    """
    found = {
        dispatcher
        for model in models
        for module in model.modules()
        if isinstance(dispatcher := getattr(module, "token_dispatcher", None), MoEDispatchTokenDispatcher)
    }
    if not found or sharding.order != "BL":
        fact = f"a sharding in order {sharding.order!r}" if found else "no MoEDispatchTokenDispatcher in these models"
        raise ValueError(
            f"{fact}; known_tokens needs order 'BL', and models whose routed_experts.token_dispatcher is one"
        )
    with ExitStack() as before:
        for dispatcher in found:
            before.callback(setattr, dispatcher, "_known", dispatcher._known)
            dispatcher._known = sharding
        yield
