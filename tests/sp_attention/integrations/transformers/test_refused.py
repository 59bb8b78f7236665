"""What cannot be right is refused on every rank, with a sentence that says what to do."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moe_dispatch import Partition, build_mesh
from moe_dispatch.testing import RankThreads
from sp_attention.integrations.transformers import (
    Parallel,
    apply_sequence_parallel,
    causal_lm_loss,
    gather_sequence,
    shard_batch,
)
from tests.support.transformers.cases import batch_of
from tests.support.transformers.models import CONFIGS, new_model


def told(act: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the text is what is tested)
        act()
    return str(error.value)


def model_and_step() -> tuple[Parallel, Any, Any]:
    parallel, model = Parallel(sp=2, ep=2, device_type="cpu"), new_model("qwen3_moe", torch.float32)
    parallel.apply(model)
    return parallel, model, parallel.shard(lengths=None, **batch_of("left"))


def forwards() -> dict[str, str]:
    parallel, model, step = model_and_step()
    inputs, ids = step.inputs, step.input_ids
    other = Parallel(dp=2, ep=2, device_type="cpu").shard(lengths=None, **batch_of("plain"))
    texts = {
        "without step": told(lambda: model(input_ids=ids, use_cache=False)),
        "inside": told(lambda: model.model(input_ids=ids, use_cache=False)),
        "cache": told(lambda: model(**{**inputs, "use_cache": True})),
        "default cache": told(lambda: model(input_ids=ids, position_ids=step.position_ids, step=step)),
        "positions": told(lambda: model(input_ids=ids, use_cache=False, step=step)),
        "other ids": told(lambda: model(**{**inputs, "input_ids": ids[:, :-1]})),
        "mask": told(lambda: model(**inputs, attention_mask=step.real_Bl)),
        "4-D mask": told(lambda: model(**inputs, attention_mask=torch.zeros(2, 1, 33, 33))),
        "weights": told(lambda: model(**inputs, output_attentions=True)),
        "option": told(lambda: model(**inputs, softcap=30.0)),
        "mesh": told(lambda: model(**other.inputs)),
        "again": told(lambda: apply_sequence_parallel(model, parallel.mesh)),
        "gather": told(lambda: gather_sequence(torch.zeros(2, 33, 3), step)),
    }
    model.set_attn_implementation("eager")
    texts["attention"] = told(lambda: model(**inputs))
    model.set_attn_implementation("sp_attention_packed")
    model.set_experts_implementation("grouped_mm")
    texts["experts"] = told(lambda: model(**inputs))
    model.set_experts_implementation("moe_dispatch")
    model(**inputs)
    return texts


FORWARDS = {
    "without step": r"model\(\*\*step.inputs\)",
    "inside": r"was called without a step.*shard_batch",
    "cache": "use_cache has to be False",
    "default cache": "use_cache has to be False",
    "positions": r"no position_ids.*model\(\*\*step.inputs\)",
    "other ids": r"input_ids of \(2, 16\) for a step of \(2, 17\)|input_ids of \(2, 15\) for a step of \(2, 16\)",
    "mask": "pass it to shard_batch",
    "4-D mask": r"pass a \(B, L\) attention_mask to shard_batch",
    "weights": "output_attentions",
    "option": "passes softcap to attention",
    "mesh": "cut for another mesh",
    "again": "attends over ranks already",
    "gather": r"\(2, 33, 3\) of a step whose inputs are",
    "attention": r"'eager' after apply_sequence_parallel.*set_attn_implementation\('sp_attention_packed'\)",
    "experts": r"set to 'grouped_mm'.*set_experts_implementation\('moe_dispatch'\)",
}


def test_a_forward_that_cannot_be_right_is_refused(rank_threads: RankThreads) -> None:
    for texts in rank_threads.run(forwards, 2):
        for what, text in texts.items():
            assert re.search(FORWARDS[what], text), (what, text)
        assert texts.keys() == FORWARDS.keys()


def small(kind: str, **settings: Any) -> Any:
    config = AutoConfig.for_model(kind, **{**CONFIGS["qwen3_moe"][1], **settings})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def models() -> dict[str, str]:
    mesh = build_mesh(sp=2, ep=2, device_type="cpu")
    linear = small("qwen3_next", num_hidden_layers=4)
    bloom = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bloom", n_layer=1, vocab_size=8, hidden_size=16, n_head=2)
    )
    return {
        "linear": told(lambda: apply_sequence_parallel(linear, mesh)),
        "bypassed": told(lambda: apply_sequence_parallel(bloom, mesh)),
        "no model": told(lambda: apply_sequence_parallel(nn.Linear(2, 2), mesh)),
    }


def test_models_that_do_not_attend_to_whole_sequences_are_refused_by_name(rank_threads: RankThreads) -> None:
    for texts in rank_threads.run(models, 2):
        assert re.search(r"qwen3_next has layers \['linear_attention'\]", texts["linear"])
        assert re.search("BloomForCausalLM.*AttentionInterface", texts["bypassed"])
        assert re.search("Linear is no PreTrainedModel", texts["no model"])


def batches(rank: int) -> dict[str, str]:
    mesh, batch = build_mesh(sp=2, ep=2, device_type="cpu"), batch_of("plain")
    ids = batch["input_ids"]

    def shard(lengths: Any = None, **changed: Any) -> str:
        return told(lambda: shard_batch({**batch, **changed}, mesh, lengths=lengths))

    tp = build_mesh(tp=2, device_type="cpu")
    return {
        "labels": shard(labels=ids[:, 1:]),
        "positions": shard(position_ids=torch.zeros(3, 2, 33, dtype=torch.int64)),
        "names": shard(token_type_ids=ids),
        "no ids": shard(input_ids=None),
        "flat": shard(input_ids=ids.flatten()),
        "lengths": shard(lengths=(20, 12)),
        "negative": shard(lengths=(34, -1)),
        "ranks": shard(lengths=(33,)),
        "other batch": shard(input_ids=ids + rank),
        "one rank": shard(lengths=(21, 11 + rank)),
        "tp": told(lambda: shard_batch(batch, tp)),
    }


BATCHES = {
    "labels": r"labels is \(2, 32\); it has to be \(B, L\) = \(2, 33\)",
    "positions": r"position_ids is \(3, 2, 33\)",
    "names": "token_type_ids",
    "no ids": "has to have input_ids",
    "flat": r"input_ids are \(66,\)",
    "lengths": "add up to that",
    "negative": "at least 0",
    "ranks": "over sp = 2",
    "other batch": "disagree.*tokens",
    "one rank": r"rank 0: lengths \(21, 11\)",
    "tp": "tp = 2.*use tp=1",
}


def test_batches_that_cannot_be_cut_are_refused_on_every_rank(rank_threads: RankThreads) -> None:
    first, second = rank_threads.run(batches, 2)
    assert first == second
    for what, text in first.items():
        assert re.search(BATCHES[what], text), (what, text)
    assert first.keys() == BATCHES.keys()


def losses() -> str:
    _, model, step = model_and_step()
    out = model(**step.inputs, output_router_logits=True)
    out.router_logits = out.router_logits[0][:3], *out.router_logits[1:]
    return told(lambda: causal_lm_loss(model, out, step))


def test_router_logits_of_other_tokens_are_refused(rank_threads: RankThreads) -> None:
    for text in rank_threads.run(losses, 2):
        assert "router_logits are [(3, 16)" in text


def cut() -> dict[str, str]:
    parallel = Parallel(sp=2, ep=2, device_type="cpu")
    model = new_model("qwen3_moe", torch.float32)
    return {
        "sizes": told(lambda: parallel.apply(model, experts=Partition((8, 7)))),
        "shape": str(tuple(model.model.layers[0].mlp.experts.down_proj.shape)),
    }


def test_a_model_whose_experts_cannot_be_cut_keeps_them(rank_threads: RankThreads) -> None:
    for texts in rank_threads.run(cut, 2):
        assert "has 16 experts, but" in texts["sizes"]
        assert texts["shape"] == "(16, 32, 16)"
