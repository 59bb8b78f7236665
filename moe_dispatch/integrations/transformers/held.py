"""What a Transformers experts module carries once it is cut: its share, and the tokens of the layer at hand."""

from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ...layer.recompute import ForwardMemory
from ...layer.share import MARK, ExpertShare
from ...layout.sharding import TokenSharding
from ...plan.counted import Counted
from ...plan.metadata import DispatchMetadata
from ...plan.terms import Terms
from ...rows.combine import combine
from ...rows.dispatch import dispatch
from .layout import compute
from .routing.calls import Routed
from .routing.hooks import routed_by_hooks
from .tokens import FedTokens, told_by_ranks

NAME = "moe_dispatch"  # in Transformers' registry, which is the process's: the function knows no model and no mesh
STEP = "step"  # the keyword of model(...) in which a step travels


class StepOfExperts(Protocol):
    """What experts read of the keyword ``step``.

    Attributes:
        tokens_of_experts: the tokens that the expert-parallel group holds.
        fed_shape: (rows, length) that this rank's model gets: with a dummy token where it has none.
    """

    tokens_of_experts: TokenSharding
    fed_shape: tuple[int, int]


class LayerAtHand:
    """The step of a decoder layer while it runs. Nothing is left when it ends, so two forwards before a backward
    cannot be mixed up. A reentrant checkpoint recomputes the layer's ``forward`` without these hooks; there is no
    step then, and ranks tell each other how many tokens they have, the dummy included."""

    def __init__(self) -> None:
        self.step: StepOfExperts | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> Self:
        """One that follows the calls of ``layer``."""
        at_hand = cls()
        layer.register_forward_pre_hook(at_hand.enter, with_kwargs=True, prepend=True)
        layer.register_forward_hook(at_hand.leave, always_call=True)
        return at_hand

    def enter(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        self.step = kwargs.get(STEP)

    def leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        """A forward hook that is always called: a recomputation ends early, by an exception."""
        self.step = None


def decoder_layer(place: str) -> str:
    """The module of the stack of layers that ``place`` is in: it is called with the keywords of the model."""
    names = place.split(".")
    numbered = [i for i, name in enumerate(names) if name.isdigit()]
    return ".".join(names[: numbered[0] + 1]) if numbered else place


class HeldExperts(ExpertShare):
    """The mark of a cut experts module."""

    def __init__(self, partition: Any, group: Any, layer: LayerAtHand) -> None:
        super().__init__(partition, group)
        self.layer = layer
        self.plans: ForwardMemory[tuple[DispatchMetadata, FedTokens]] = ForwardMemory()

    def tokens_at_hand(self, num_rows: int, device: torch.device) -> FedTokens:
        """Those of the step of this layer, or those that ranks tell."""
        step = self.layer.step
        if step is None:
            return told_by_ranks(num_rows, device=device, group=self.group)
        return FedTokens(step.tokens_of_experts, self.group.rank(), step.fed_shape)

    def plan(self, x_TD: Tensor, routed: Routed, of_any: bool) -> tuple[DispatchMetadata, FedTokens]:
        """The plan of this call, and its tokens; a host sync or two."""
        tokens, weight_TK = routed.tokens or self.tokens_at_hand(len(x_TD), x_TD.device), routed.weight_TK
        terms = Terms(
            sharding=tokens.sharding,
            experts=self.partition,
            dim=x_TD.shape[1],
            dtype=x_TD.dtype,
            also=f"gradients of tokens, weights or experts {of_any}, weights of {weight_TK.dtype}",
        )
        if routed.problem:
            num_choices = weight_TK.shape[1]
            Counted().refuse(routed.problem, terms, self.group, num_choices=num_choices, device=x_TD.device)
        weight_BlK = tokens.own(weight_TK).detach()
        plan = Counted().plan(tokens.own(routed.expert_TK), weight_BlK, terms, self.group)
        routed.show(tokens)  # planned: every rank has taken the same forward
        return plan, tokens


def experts_over_ranks(experts: Any, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The registered function: (T, D) rows, (T, K) ids of all experts and (T, K) weights -> (T, D), the sums."""
    held = getattr(experts, MARK, None)
    if not isinstance(held, HeldExperts):
        raise ValueError(
            f"experts_implementation is {NAME!r}, but {type(experts).__name__} is not cut over ranks; call "
            "apply_expert_parallel(model, mesh)"
        )
    return over_ranks(held, experts, x_TD, expert_TK, weight_TK, compute)


def over_ranks(
    held: HeldExperts,
    experts: Any,
    x_TD: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    compute: Callable[[Any, Tensor, Tensor], Tensor],
) -> Tensor:
    """The same, with the computation of this rank's experts: (experts, (M, D) rows by expert, (e,) how many each has)
    -> (M, D), unweighted, and part of the graph without rows, too."""
    routed = routed_by_hooks(experts, expert_TK, weight_TK)
    learns = x_TD.requires_grad or weight_TK.requires_grad or any(w.requires_grad for w in experts.parameters())
    of_any = torch.is_grad_enabled() and learns
    plan, tokens = held.plans.recall(lambda: held.plan(x_TD, routed, of_any))
    x_MD, weight_M = dispatch(tokens.own(x_TD), tokens.own(routed.weight_TK), plan)
    y_MD = compute(experts, x_MD, plan.rows_per_expert_e)
    return tokens.feed(combine(y_MD, plan, weight_M)).to(x_TD.dtype)
