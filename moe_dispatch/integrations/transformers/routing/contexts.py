"""Contexts in which a Transformers model is recorded or replayed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ....routing.names import OF_WRAPPERS, without_wrappers
from ....routing.record import RoutingRecord
from ....routing.recording import recording
from ....routing.replaying import replaying
from ....routing.sites import Site
from ..layout import is_experts
from .calls import OwnBatch
from .hooks import RoutingHooks, hooks_of


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """:func:`moe_dispatch.record_routing` for a model of Transformers: on one process, as it is, or over ranks, after
    :func:`apply_expert_parallel`. A layer has the name of its experts module, ``model.layers.0.mlp.experts``.

    On one process a token is ``row * L + position`` of the (B, L) batch that the model is called with. Over ranks it
    is the same of the whole batch that a step was cut from. Where the ranks are called without a step, their tokens
    are one row, rank after rank. Padding of an attention mask is routed by Transformers as any token, and recorded.

    Raises:
        ValueError: a model without experts of Transformers, or a layer whose router does not tell its K.
    """
    with _tapped(model) as sites, recording(sites) as record:
        yield record


@contextmanager
def replay_routing(model: nn.Module, record: RoutingRecord) -> Iterator[None]:
    """:func:`moe_dispatch.replay_routing` for a model of Transformers, on one process or over ranks, wherever the
    record was made.

    Each router runs its own code on its own weights; its ``topk`` among all experts gives those of the record. So
    weights are those of the model's formula, and gradients pass through the scores as they are now. A token without
    experts (-1) has weights 0. Logits that the model returns (``output_router_logits``), and its balance loss, are
    those of today.

    Raises:
        GroupError: over ranks, as :func:`moe_dispatch.replay_routing`, and on every rank before any row moves: a
            router that chooses in another way.
        ValueError: the same on one process, where no other rank has to know.
    """
    with _tapped(model) as sites, replaying(sites, record):
        yield


@contextmanager
def _tapped(model: nn.Module) -> Iterator[dict[str, Site]]:
    hooks = _hooks_of_layers(model)
    sites = {name: one.site() for name, one in hooks.items()}
    for one in hooks.values():
        one.hold()
    try:
        yield sites
    finally:
        for one in hooks.values():
            one.release()


def _hooks_of_layers(model: nn.Module) -> dict[str, RoutingHooks]:
    modules, own, hooks = dict(model.named_modules()), OwnBatch(), dict[str, RoutingHooks]()
    for place, module in modules.items():
        if is_experts(module) and place:
            name = without_wrappers(place, modules)
            hooks[name] = hooks_of(name, modules[_place_of_block(place)], module, own)
    if not hooks:
        raise ValueError(
            f"no layer of this {type(model).__name__} has experts that follow Transformers' ExpertsInterface; pass "
            "the model that holds them (layers of moe_dispatch.MoE have moe_dispatch.record_routing and "
            "replay_routing)"
        )
    return hooks


def _place_of_block(place: str) -> str:
    """The module around the experts, and around what wraps them."""
    names = place.split(".")
    while names[-1] in OF_WRAPPERS:
        names.pop()
    return ".".join(names[:-1])
