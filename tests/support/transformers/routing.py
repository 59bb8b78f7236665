"""Recorded and replayed models, and the same with a choice that is forced by hand."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from moe_dispatch import RoutingRecord
from moe_dispatch.integrations.transformers import record_routing, replay_routing
from sp_attention.integrations.transformers import Parallel
from tests.support.ranks import world
from tests.support.transformers.cases import Layout, Run, whole_gradients
from tests.support.transformers.models import new_model

Batch = dict[str, Tensor]
Recompute = bool | None  # no checkpoints, or (use_reentrant) of which kind


def routers(model: nn.Module) -> list[Any]:
    return [x for x in model.modules() if hasattr(x, "top_k") and hasattr(x, "weight")]


@torch.no_grad()
def move(model: nn.Module) -> None:
    """What training does to routers between a record and its replay, and more: most tokens would go elsewhere."""
    for router in routers(model):
        router.weight.copy_(router.weight.roll(1, 0) * 1.2)
        for name, bias_E in router.named_buffers():
            assert name == "e_score_correction_bias"
            bias_E.copy_(bias_E.flip(0))


def model_of(name: str, dtype: torch.dtype, moved: bool, recompute: Recompute = None) -> Any:
    model = new_model(name, dtype)
    if moved:
        move(model)
    if recompute is not None:
        model.train()
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": recompute})
    return model


def record_of(name: str, dtype: torch.dtype, *batches: Batch, moved: bool = False) -> RoutingRecord:
    """On one process."""
    model = model_of(name, dtype, moved)
    with record_routing(model) as record:
        for batch in batches:
            model(**batch, use_cache=False)
    return record


def trained(model: Any, *batches: Batch) -> Run:
    """One process, all forwards before all backwards; logits one batch behind the other, and the sum of losses."""
    outs = [model(**batch, use_cache=False) for batch in batches]
    loss = torch.stack([out.loss for out in outs]).sum()
    loss.backward()
    logits_BLV = torch.cat([out.logits.detach() for out in outs], dim=1)
    return Run(logits_BLV, loss.item(), {n: p.grad for n, p in model.named_parameters()})


def replayed(
    name: str,
    dtype: torch.dtype,
    layout: Layout,
    record: RoutingRecord,
    batches: list[Batch],
    *,
    moved: bool = True,
    recompute: Recompute = None,
    inside: bool = False,
) -> tuple[Run, RoutingRecord]:
    """The same on a rank of a layout, with a record; and what was recorded meanwhile, of all ranks.

    Args:
        inside: whether backward is in the context of the replay, or after it and after another forward.
    """
    parallel = Parallel(dp=layout.dp, sp=layout.sp, ep=layout.ep, device_type="cpu")
    model = model_of(name, dtype, moved, recompute)
    parallel.apply(model)
    steps = [parallel.shard(**batch, lengths=layout.lengths, sharding=layout.sharding) for batch in batches]
    with ExitStack() as context, record_routing(model) as again:
        context.enter_context(replay_routing(model, record))
        outs = [model(**step.inputs) for step in steps]
        if not inside:
            context.close()
        losses = [parallel.loss(model, out, step) for out, step in zip(outs, steps, strict=True)]
        torch.stack([loss.share for loss in losses]).sum().backward()
    parallel.sum_gradients(model)
    logits = [parallel.gather(out.logits, step).detach() for out, step in zip(outs, steps, strict=True)]
    loss = sum(loss.whole.item() for loss in losses)
    return Run(torch.cat(logits, dim=1), loss, whole_gradients(model)), again.gather(world())


def recorded(name: str, dtype: torch.dtype, layout: Layout, batches: list[Batch]) -> RoutingRecord:
    """By the ranks of a layout."""
    parallel, model = Parallel(dp=layout.dp, sp=layout.sp, ep=layout.ep, device_type="cpu"), new_model(name, dtype)
    parallel.apply(model)
    with record_routing(model) as record:
        for batch in batches:
            model(**parallel.shard(**batch, lengths=layout.lengths, sharding=layout.sharding).inputs)
    return record.gather(world())


# ---- by hand: routers of the four families, which are given the experts ----------------------------------------


def _deepseek_v3(router: Any, x_TD: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    logits_TE = x_TD @ router.weight.T
    weight_TK = (1 / (1 + torch.exp(-logits_TE))).take_along_dim(ids_TK, 1)
    return logits_TE, router.routed_scaling_factor * weight_TK / weight_TK.sum(1, keepdim=True)


def _softmax(router: Any, x_TD: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    logits_TE = x_TD @ router.weight.T
    weight_TK = logits_TE.softmax(1).take_along_dim(ids_TK, 1)
    return logits_TE, weight_TK / weight_TK.sum(1, keepdim=True)


def _gpt_oss(router: Any, x_TD: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    logits_TE = x_TD @ router.weight.T + router.bias
    return logits_TE, logits_TE.take_along_dim(ids_TK, 1).softmax(1)


BY_HAND: dict[str, Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "deepseek_v3": _deepseek_v3, "qwen3_moe": _softmax, "mixtral": _softmax, "gpt_oss": _gpt_oss,
}  # fmt: skip


def forced(name: str, dtype: torch.dtype, record: RoutingRecord, *, moved: bool = True) -> Any:
    """A model of one process whose routers are replaced by the lines above."""
    model = model_of(name, dtype, moved)
    for router, forwards in zip(routers(model), record.layers.values(), strict=True):
        left = iter([x.expert_NK.to(torch.int64) for x in forwards])

        def forward(x_BLD: Tensor, router: Any = router, left: Any = left) -> tuple[Tensor, Tensor, Tensor]:
            ids_TK = next(left)
            logits_TE, weight_TK = BY_HAND[model.config.model_type](router, x_BLD.flatten(0, -2), ids_TK)
            return logits_TE, weight_TK, ids_TK

        router.forward = forward
    return model
