"""Checkpoints, microbatches, modes without gradients, copies, several meshes, low precision."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dispatch.testing import RankThreads
from sp_attention import count_targets
from sp_attention.integrations.transformers import Parallel, Step
from tests.support.ranks import world
from tests.support.transformers.cases import (
    Layout,
    batch_of,
    differences,
    on_one_process,
    over_ranks,
    whole_gradients,
)
from tests.support.transformers.models import FAMILIES, new_model
from tests.support.transformers.strict import strict_float64

STRICT = 1e-12
DTYPE = torch.float64
LAYOUT = Layout(2, 2, 4, (33, 0))


def recompute_layers(model: Any, use_reentrant: bool) -> None:
    model.train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})


def recompute_layers_reentrantly(model: Any) -> None:
    recompute_layers(model, True)


def recompute_layers_by_hooks(model: Any) -> None:
    recompute_layers(model, False)


def recompute_experts_reentrantly(model: Any) -> None:
    recompute_experts_alone(model, True)


def recompute_experts_alone(model: Any, use_reentrant: bool = False) -> None:
    for layer in model.model.layers:
        inside = layer.mlp.forward
        layer.mlp.forward = lambda x, inside=inside: checkpoint(inside, x, use_reentrant=use_reentrant)


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize(
    "change",
    [recompute_layers_reentrantly, recompute_layers_by_hooks, recompute_experts_alone, recompute_experts_reentrantly],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoints_give_the_gradients_of_one_process(rank_threads: RankThreads, name: str, change: Any) -> None:
    with strict_float64():
        batch = batch_of("plain")
        reference = on_one_process(name, DTYPE, batch)
        for run in rank_threads.run(over_ranks, LAYOUT.ranks, name, DTYPE, batch, LAYOUT, change):
            assert max(differences(run, reference).values()) <= STRICT


def microbatches(use_reentrant: bool | None) -> dict[str, Tensor]:
    """Two of different lengths and splits, both forwarded before either backward."""
    parallel, model = Parallel(dp=2, sp=2, ep=4, device_type="cpu"), new_model("qwen3_moe", DTYPE)
    parallel.apply(model)
    if use_reentrant is not None:
        recompute_layers(model, use_reentrant)
    steps = [
        parallel.shard(lengths=(20, 13), **batch_of("left")),
        parallel.shard(lengths=(0, 17), **batch_of("packed", length=17)),
    ]
    targets = count_targets([step.target_Bl for step in steps], group=world())
    outs = [(model(**step.inputs), step) for step in steps]
    for share in [parallel.loss(model, out, step, num_targets=targets).share for out, step in outs]:
        share.backward()
    parallel.sum_gradients(model)
    return whole_gradients(model)


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_microbatches_may_be_forwarded_before_either_backward(
    rank_threads: RankThreads, use_reentrant: bool | None
) -> None:
    with strict_float64():
        model, batches = new_model("qwen3_moe", DTYPE), [batch_of("left"), batch_of("packed", length=17)]
        targets = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
        for batch in batches:
            model(**batch, use_cache=False, num_items_in_batch=targets).loss.backward()
        for gradients in rank_threads.run(microbatches, 4, use_reentrant):
            for name, weight in model.named_parameters():
                assert float((gradients[name] - weight.grad).norm()) <= STRICT * float(weight.grad.norm()), name


def without_gradients() -> list[bool]:
    parallel, model = Parallel(sp=2, ep=2, device_type="cpu"), new_model("gpt_oss", DTYPE)
    parallel.apply(model)
    step = parallel.shard(lengths=None, **batch_of("packed"))
    learning = parallel.gather(model(**step.inputs).logits, step).detach()
    with torch.no_grad():
        first = parallel.gather(model(**step.inputs).logits, step)
    with torch.inference_mode():
        second = parallel.gather(model(**step.inputs).logits, step)
    copied = copy.deepcopy(model)
    third = parallel.gather(copied(**step.inputs).logits, step).detach()
    copied.model.layers[0].mlp.experts.experts_of_ranks.layer.enter(copied, (), {"step": step})
    apart = model.model.layers[0].mlp.experts.experts_of_ranks.layer.step is None
    return [*(torch.equal(learning, x) for x in (first, second, third)), apart]


def test_without_gradients_and_in_copies_the_bits_are_the_same(rank_threads: RankThreads) -> None:
    assert rank_threads.run(without_gradients, 2) == [[True] * 4] * 2


def two_meshes() -> list[Tensor]:
    made = [Parallel(sp=4, ep=2, device_type="cpu"), Parallel(dp=2, sp=2, ep=4, device_type="cpu")]
    models = [new_model(name, DTYPE) for name in ("qwen3_moe", "gpt_oss")]
    for parallel, model in zip(made, models, strict=True):
        parallel.apply(model)
    batch = batch_of("packed")
    lengths = ((17, 1, 10, 5), (3, 30))
    steps: list[Step] = [p.shard(lengths=part, **batch) for p, part in zip(made, lengths, strict=True)]
    outs = [model(**step.inputs) for model, step in zip(models, steps, strict=True)]
    for parallel, model, out, step in zip(made, models, outs, steps, strict=True):
        parallel.loss(model, out, step).share.backward()
        parallel.sum_gradients(model)
    return [p.gather(out.logits, step).detach() for p, out, step in zip(made, outs, steps, strict=True)]


def test_two_models_on_different_meshes_in_one_process(rank_threads: RankThreads) -> None:
    with strict_float64():
        wanted = [on_one_process(name, DTYPE, batch_of("packed")).logits_BLV for name in ("qwen3_moe", "gpt_oss")]
        for found in rank_threads.run(two_meshes, 4):
            for logits_BLV, wanted_BLV in zip(found, wanted, strict=True):
                assert float((logits_BLV - wanted_BLV).abs().max()) <= STRICT


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_bfloat16_is_as_near_as_its_rounding(rank_threads: RankThreads, name: str) -> None:
    """Of most tokens: rounding routes a few to other experts."""
    batch = batch_of("plain")
    wanted = on_one_process(name, torch.bfloat16, batch)
    for run in rank_threads.run(over_ranks, 4, name, torch.bfloat16, batch, Layout(1, 4, 4, (17, 1, 10, 5))):
        off_BL = (run.logits_BLV - wanted.logits_BLV).abs().amax(-1).float()
        assert float(off_BL.median()) < 0.2
        assert all(gradient.dtype == torch.bfloat16 for gradient in run.gradients.values())
