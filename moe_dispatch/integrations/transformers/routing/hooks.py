"""Hooks of a layer of a Transformers model while its experts are recorded or replayed.

A *block* is the module that has experts and, beside them, a router. Its ``forward`` is replaced: it says which tokens
come, and compiled code looks whether a ``forward`` was replaced, but not for hooks. Hooks of the modules beside the
experts run the router with a choice that is made already: they are called in a recomputation, too, wherever the
checkpoint is. What the experts get is what is recorded.

All of it is there from the start of a context to its end, and after it for as long as the graph of a checkpoint lives
that will run a replayed forward again.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ....layer.recompute import check_not_hidden
from ....layer.share import MARK
from ....layout.partition import Partition
from ....routing.sites import Site
from ....wire.policies import unseen_by_policies
from ....wire.uncompiled import uncompiled
from ..tokens import IMPLEMENTATION, FedTokens
from .calls import Call, OwnBatch, Routed
from .choice import ForcedChoice, num_choices
from .decisions import Decisions

PLACE = "routing_hooks"  # the attribute of an experts module that has them


class HoldsTokens(Protocol):
    """The mark of experts that are cut over ranks."""

    group: dist.ProcessGroup
    partition: Partition

    def tokens_at_hand(self, num_rows: int, device: torch.device) -> FedTokens: ...


class RoutingHooks:
    """Of one block and its experts.

    Args:
        name: of the experts, for errors.
        own: for experts that are not cut.
    """

    def __init__(self, name: str, block: nn.Module, experts: Any, own: OwnBatch) -> None:
        self._name, self._block, self._experts, self._own = name, block, experts, own
        self._num_choices = num_choices(name, block, experts)
        self._decisions, self._contexts = Decisions(self._remove_if_idle), 0
        self._handles: list[RemovableHandle] = []
        self._own_forward: dict[str, Callable[..., Any]] = {}  # where the block has one that is not of its class
        self._call: Call | None = None
        self._routed: Routed | None = None
        self._entered: list[ForcedChoice] = []

    def __getstate__(self) -> dict[str, Any]:
        """Nobody is at a copy of the model."""
        return {**vars(self), "_contexts": 0, "_call": None, "_routed": None, "_entered": []}

    def site(self) -> Site:
        """ValueError for a layer that no record can know."""
        if self._held is None and self._experts._is_expert_parallel:
            raise ValueError(
                f"{self._name} is cut over ranks by Transformers, and does not know which tokens other ranks have; "
                "cut it by apply_expert_parallel, or by DistributedConfig with ep_implementation='moe_dispatch'"
            )
        return Site(
            tap=self._decisions.tap,
            num_experts=self._num_experts,
            num_choices=self._num_choices,
            groups=() if self._held is None else (self._held.group,),
            all_or_none=True,
        )

    @property
    def _held(self) -> HoldsTokens | None:
        """Whoever holds experts that are cut: ourselves, or Transformers with our exchange."""
        attributes = vars(self._experts)
        return attributes[IMPLEMENTATION].held if IMPLEMENTATION in attributes else attributes.get(MARK)

    @property
    def _num_experts(self) -> int:
        return self._experts.num_experts if self._held is None else self._held.partition.total

    # ---- contexts ------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """A context starts."""
        self._contexts += 1
        if self._handles:
            return
        setattr(self._experts, PLACE, self)
        self._own_forward = {name: x for name, x in vars(self._block).items() if name == "forward"}
        self._block.forward = self._run
        # A checkpoint wrapper around the experts passes on what it was given, also when it recomputes.
        around = [x for x in self._block.children() if any(y is self._experts for y in x.modules())]
        beside = [x for x in self._block.children() if x not in around]
        self._handles = [
            *(module.register_forward_pre_hook(self._enter) for module in beside),
            *(module.register_forward_hook(self._leave, always_call=True) for module in beside),
            *(module.register_forward_pre_hook(self._give, with_kwargs=True) for module in around),
        ]

    def release(self) -> None:
        """A context ends."""
        self._contexts -= 1
        self._end()
        self._remove_if_idle()

    def _remove_if_idle(self) -> bool:
        if self._contexts or self._decisions.alive:
            return False
        if self._handles:
            delattr(self._experts, PLACE)
            if vars(self._block).get("forward") == self._run:  # or somebody replaced it meanwhile, and calls us
                del self._block.forward
                vars(self._block).update(self._own_forward)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return True

    # ---- hooks ---------------------------------------------------------------------------------------------

    @uncompiled("a graph would be that of one choice")
    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The ``forward`` of the block."""
        forward = self._own_forward.get("forward", partial(type(self._block).forward, self._block))
        if self._remove_if_idle():  # of a copy of the model that was made in a context
            return forward(*args, **kwargs)
        x_BLD = args[0] if args else kwargs.get("hidden_states")
        grid = tuple(x_BLD.shape[:2]) if isinstance(x_BLD, Tensor) and x_BLD.ndim == 3 else ()
        self._call = Call(grid, self._decisions.are_replayed())
        try:
            return forward(*args, **kwargs)
        finally:
            self._end()

    def _end(self) -> None:
        self._call = self._routed = None
        while self._entered:  # of a router that Ctrl-C ended
            self._leave()

    def _enter(self, module: nn.Module, args: Any) -> None:
        call = self._at_hand()
        if call.router is module:  # a call before this one did not come to its experts
            self._call = call = Call(call.grid, self._decisions.are_replayed())
        if call.replays:
            mode = ForcedChoice(self._num_experts, self._num_choices, partial(self._answer, module))
            mode.__enter__()
            self._entered.append(mode)

    def _leave(self, *of_hook: Any) -> None:
        if self._entered:
            self._entered.pop().__exit__(None, None, None)

    def _give(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Experts of one process compute what they are given here. Those that are cut plan first."""
        signature = inspect.signature(type(self._experts).forward)
        x_TD, expert_TK, weight_TK = signature.bind(self._experts, *args, **kwargs).args[1:]
        routed = self._take(expert_TK, weight_TK)
        if self._held is not None:
            self._routed = routed
            return (x_TD, routed.expert_TK, routed.weight_TK), {}
        if routed.problem:
            raise ValueError(routed.problem)
        routed.show(routed.tokens)
        return (x_TD, routed.expert_TK.clamp(min=0), routed.weight_TK), {}

    def hand_over(self, routed: Routed) -> Routed:
        """What experts that are cut are called with -> the same with what was found out about it, once."""
        found, self._routed = self._routed, None
        return routed if found is None else found

    # ---- what they do --------------------------------------------------------------------------------------

    def _at_hand(self) -> Call:
        """A recomputation may be of parts of a block only."""
        if self._call is None:
            self._call = Call((), self._decisions.are_replayed())
        return self._call

    def _answer(self, router: nn.Module, scores_TE: Tensor) -> Tensor | None:
        """(T, K) experts in place of those that the router would choose, unless something is wrong."""
        call = self._at_hand()
        if call.given_TK is None and not call.problem:
            call.router = router
            try:
                call.replayed = self._decisions.recall(lambda: self._next(call, len(scores_TE), scores_TE.device))
            except ValueError as error:
                call.problem = str(error)
            else:
                call.given_TK = call.replayed.expert_TK.clamp(min=0)
        return call.given_TK

    @unseen_by_policies
    def _next(self, call: Call, num_rows: int, device: torch.device) -> Tensor:
        call.tokens = tokens = self._tokens(call.grid, num_rows, device)
        check_not_hidden()
        expert_BlK = self._decisions.tap.sources[-1].next(tokens.sharding, tokens.rank)
        return tokens.feed(expert_BlK.to(device), dummy=-1)

    def _tokens(self, grid: tuple[int, ...], num_rows: int, device: torch.device) -> FedTokens:
        if self._held is not None:
            return self._held.tokens_at_hand(num_rows, device)
        try:
            return self._own.tokens(grid, num_rows)
        except ValueError as error:
            raise ValueError(f"{self._name}: {error}") from None

    def _take(self, expert_TK: Tensor, weight_TK: Tensor) -> Routed:
        """What experts are called with -> what they have to compute."""
        call, self._call = self._at_hand(), None
        problem = call.problem or self._problem(call, expert_TK)
        if call.replayed is not None and not problem:
            expert_TK = call.replayed.expert_TK
            weight_TK = weight_TK.masked_fill(expert_TK < 0, 0)
        tap = self._decisions.tap
        routed = Routed(expert_TK=expert_TK, weight_TK=weight_TK, tokens=call.tokens, problem=problem, tap=tap)
        if routed.is_seen and routed.tokens is None and not problem:
            tokens = self._tokens(call.grid, len(expert_TK), expert_TK.device)
            routed = replace(routed, tokens=tokens)
        return routed

    def _problem(self, call: Call, expert_TK: Tensor) -> str:
        if not call.replays:
            return ""
        total, given_TK = self._num_experts, call.given_TK
        if given_TK is None:
            return (
                f"{self._name} cannot replay a record: the router of {type(self._block).__name__} does not choose "
                f"its {self._num_choices} experts by one topk of all {total} scores, so nothing can choose in its "
                "place"
            )
        if expert_TK is not given_TK and not torch.equal(expert_TK, given_TK):
            return (
                f"{self._name} cannot replay a record: {type(self._block).__name__} sends tokens to other experts "
                "than its router's topk chose"
            )
        return ""


def hooks_of(name: str, block: nn.Module, experts: nn.Module, own: OwnBatch) -> RoutingHooks:
    """Those that are there, or new ones."""
    return vars(experts).get(PLACE) or RoutingHooks(name, block, experts, own)


def routed_by_hooks(experts: nn.Module, expert_TK: Tensor, weight_TK: Tensor) -> Routed:
    """For experts that are cut: what they have to compute."""
    routed, hooks = Routed(expert_TK=expert_TK, weight_TK=weight_TK), vars(experts).get(PLACE)
    return routed if hooks is None else hooks.hand_over(routed)
