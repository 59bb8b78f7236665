"""Models that Transformers loads and shards, with our exchange and sequence parallelism: one process's numbers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from moe_dispatch import share_of_state_dict, whole_state_dict
from moe_dispatch.integrations.transformers import register_implementation
from moe_dispatch.testing import RankPool, RankThreads
from sp_attention.integrations.transformers import Parallel, apply_sequence_parallel
from tests.support.ranks import refusal
from tests.support.transformers.cases import Layout, Run, batch_of, differences, on_one_process
from tests.support.transformers.models import CONFIGS, FAMILIES, new_model
from tests.support.transformers.sharded import (
    let_fsdp_sum,
    planned_tokens,
    shard_by_transformers,
    whole_gradients_of_dtensors,
)
from tests.support.transformers.strict import strict_float64

STRICT = 1e-12
DTYPE = torch.float64
LENGTHS = (17, 1, 15, 0)


def with_a_step(model: Any, parallel: Parallel, batch: dict[str, Any], lengths: tuple[int, ...] | None) -> Run:
    step = parallel.shard(**batch, lengths=lengths)
    out = model(**step.inputs)
    loss = parallel.loss(model, out, step)
    loss.share.backward()
    parallel.sum_gradients(model)
    logits_BLV = parallel.gather(out.logits, step).detach()
    return Run(logits_BLV, loss.whole.item(), whole_gradients_of_dtensors(model))


def stepped(name: str, layout: Layout, batch: dict[str, Tensor]) -> tuple[Run, list[int]]:
    model, parallel = new_model(name, DTYPE), Parallel(dp=layout.dp, sp=layout.sp, ep=layout.ep, device_type="cpu")
    shard_by_transformers(model, ep=layout.ep)
    apply_sequence_parallel(model, parallel.mesh)
    return with_a_step(model, parallel, batch, layout.lengths), []


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize("layout", [Layout(1, 4, 4, LENGTHS), Layout(2, 2, 4, (33, 0))], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_is_that_of_one_process(rank_threads: RankThreads, name: str, layout: Layout) -> None:
    batch = batch_of("left")
    with strict_float64():
        reference = on_one_process(name, DTYPE, batch)
        for run, _ in rank_threads.run(stepped, 4, name, layout, batch):
            assert max(differences(run, reference, batch["attention_mask"]).values()) <= STRICT


def loaded(folder: Path, **sizes: int) -> Any:
    register_implementation()
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=DTYPE,
        attn_implementation="eager",
        experts_implementation="eager",
        distributed_config=DistributedConfig(**sizes, ep_implementation="moe_dispatch"),  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class Loaded:
    """How Transformers shards over 4 ranks, and which checkpoints recompute (none, where empty)."""

    sizes: dict[str, int]
    checkpoints: dict[str, bool] = field(default_factory=dict)


def trained(folder: Path, case: Loaded) -> tuple[Run, float, list[int], list[bool]]:
    with strict_float64(), planned_tokens() as planned:
        model, batch = loaded(folder, **case.sizes), batch_of("left")
        parallel = Parallel(sp=4, ep=case.sizes["ep_size"], device_type="cpu")
        let_fsdp_sum(model)
        if case.checkpoints:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=case.checkpoints)
            model.train()
        apply_sequence_parallel(model, parallel.mesh)
        run = with_a_step(model, parallel, batch, LENGTHS)
        norm = float(parallel.clip_grad_norm(model, 1.0))
        whole = whole_state_dict(model)
        for weight in model.parameters():
            weight.data.zero_()
        model.load_state_dict(share_of_state_dict(whole, model))
        back = whole_state_dict(model)
    file = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    held = sum(weight.to_local().numel() for weight in model.parameters())
    facts = [
        all(torch.equal(whole[name], back[name]) for name in whole),
        all(torch.equal(whole[name], weight) for name, weight in file.items()),
        whole.keys() == file.keys(),
        held * case.sizes["fsdp_size"] == sum(weight.numel() for weight in model.parameters()),
    ]
    return run, norm, planned, facts


OVER_TWO, OVER_FOUR = {"fsdp_size": 4, "ep_size": 2}, {"fsdp_size": 4, "ep_size": 4}
CASES = [
    *((name, Loaded(OVER_TWO)) for name in FAMILIES),
    ("qwen3_moe", Loaded(OVER_FOUR)),
    ("gpt_oss", Loaded({"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2})),
    ("mixtral", Loaded(OVER_TWO, {"use_reentrant": False})),
    ("mixtral", Loaded(OVER_TWO, {"use_reentrant": True})),
]


@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
def test_a_model_from_a_folder_trains_as_one_process(
    rank_pool: RankPool, tmp_path: Path, name: str, case: Loaded
) -> None:
    new_model(name, DTYPE).save_pretrained(tmp_path)
    batch = batch_of("left")
    with strict_float64():
        reference = on_one_process(name, DTYPE, batch)
    wanted = float(torch.stack([gradient.norm() for gradient in reference.gradients.values()]).norm())
    # The tokens of the step, without the dummy of the rank that has none; a reentrant recomputation asks the ranks.
    of_step = {2 * 33, 2 * 18, 2 * 15} | ({2 * 15 + 2} if case.checkpoints.get("use_reentrant") else set())
    for run, norm, planned, facts in rank_pool.run(trained, 4, tmp_path, case, timeout=300):
        assert max(differences(run, reference, batch["attention_mask"]).values()) <= STRICT
        assert abs(norm - wanted) <= STRICT * wanted
        assert planned
        assert set(planned) <= of_step
        assert facts == [True] * 4


ROWS = ((0, 3), (3, 4), (4, 5), (5, 6))


def without_a_step(rank: int, folder: Path) -> tuple[Run, list[str]]:
    """As any training loop feeds it: each rank's own rows, and a loss by the number of all targets."""
    with strict_float64():
        model, batch, texts = loaded(folder, **OVER_FOUR), batch_of("left", rows=6), list[str]()
        parallel = Parallel(dp=4, ep=4, device_type="cpu")
        factor = model.model.layers[0].mlp.experts._get_fsdp_state()._fsdp_param_groups[0].gradient_divide_factor
        texts.append(refusal(lambda: parallel.sum_gradients(model)))
        let_fsdp_sum(model)
        model.model.layers[0].mlp.experts.set_gradient_divide_factor(factor)
        texts.append(refusal(lambda: parallel.sum_gradients(model)))
        let_fsdp_sum(model)
        mine = {what: x_BL[slice(*ROWS[rank])] for what, x_BL in batch.items()}
        num_targets = (batch["labels"][:, 1:] != -100).sum()
        out = model(**mine, num_items_in_batch=num_targets, use_cache=False)
        out.loss.backward()
        parallel.sum_gradients(model)
        loss = out.loss.detach().clone()
        dist.all_reduce(loss)
    return Run(out.logits.detach(), loss.item(), whole_gradients_of_dtensors(model)), texts


def test_a_loop_of_transformers_trains_as_one_process(rank_pool: RankPool, tmp_path: Path) -> None:
    new_model("gpt_oss", DTYPE).save_pretrained(tmp_path)
    batch = batch_of("left", rows=6)
    with strict_float64():
        reference = on_one_process("gpt_oss", DTYPE, batch)
    found = rank_pool.run(without_a_step, 4, tmp_path, timeout=300)
    logits_BLV = torch.cat([run.logits_BLV for run, _ in found])
    for run, texts in found:
        whole = Run(logits_BLV, run.loss, run.gradients)
        assert max(differences(whole, reference, batch["attention_mask"]).values()) <= STRICT
        assert "FSDP2 around model.embed_tokens averages gradients" in texts[0]
        assert "FSDP2 around model.layers.0.mlp.experts averages gradients" in texts[1]  # on a mesh of one rank


def averaged(rank: int, folder: Path) -> Run:
    """As Transformers has it: means of ranks with as many targets each, and FSDP2 that averages."""
    with strict_float64():
        model, ids = loaded(folder, **OVER_TWO), batch_of("plain", rows=4)["input_ids"][rank : rank + 1]
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
    return Run(out.logits.detach(), out.loss.item(), whole_gradients_of_dtensors(model))


def test_averages_of_transformers_are_right_for_equal_ranks(rank_pool: RankPool, tmp_path: Path) -> None:
    new_model("mixtral", DTYPE).save_pretrained(tmp_path)
    ids = batch_of("plain", rows=4)["input_ids"]
    with strict_float64():
        reference = on_one_process("mixtral", DTYPE, {"input_ids": ids, "labels": ids})
    found = rank_pool.run(averaged, 4, tmp_path, timeout=300)
    whole = Run(torch.cat([run.logits_BLV for run in found]), sum(run.loss for run in found) / 4, found[0].gradients)
    assert max(differences(whole, reference).values()) <= STRICT


def other_mesh() -> str:
    model, parallel = new_model("mixtral", DTYPE), Parallel(dp=2, ep=1, device_type="cpu")
    shard_by_transformers(model, ep=2)
    return refusal(lambda: apply_sequence_parallel(model, parallel.mesh))


def test_steps_of_another_mesh_are_refused(rank_threads: RankThreads) -> None:
    first, second = rank_threads.run(other_mesh, 2)
    assert first == second
    assert (
        "model.layers.0.mlp.experts is over the ranks (0, 1) by DistributedConfig, but the mesh has ep over (0,)"
        in first
    )
