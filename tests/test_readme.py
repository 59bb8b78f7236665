"""The README is short, shows the examples as they are, and they compute what they say and print what it shows."""

import importlib
import re
import subprocess
import sys
from copy import deepcopy
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_dispatch import GroupedExperts, Partition, TokenSharding
from moe_dispatch.reference import ReferenceMoE
from moe_dispatch.testing import RankPool

from .support.markdown import ROOT, fences
from .support.ranks import world

README = ROOT / "README.md"
EXAMPLES = ROOT / "examples"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``training_step``, which imports ``block``; ranks import them from the same place."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("training_step")


def example(name: str) -> ModuleType:
    """An example, on a rank that was told where they are."""
    return importlib.import_module(name)


def test_the_readme_is_read_in_one_go() -> None:
    assert len(README.read_text().splitlines()) < 200


def test_the_readme_and_pages_show_the_examples_as_they_are() -> None:
    block, step, of_transformers = fences(README, "python")
    assert block == (EXAMPLES / "block.py").read_text()
    assert step == (EXAMPLES / "step.py").read_text()
    assert of_transformers in (EXAMPLES / "transformers_moe.py").read_text()
    assert len(of_transformers.splitlines()) <= 12
    assert fences(ROOT / "docs/training-step.md", "python") == [(EXAMPLES / "training_step.py").read_text()]
    assert fences(ROOT / "docs/subjects.md", "python")[0] == (EXAMPLES / "subject.py").read_text()


def test_the_block_prints_what_the_readme_shows() -> None:
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "block.py"], capture_output=True, text=True, timeout=300, check=True
    )
    assert ran.stdout == fences(README, "text")[0]


def first_numbers(rank: int) -> list[float]:
    """Of the experts and the routers of two layers of a model."""
    torch.manual_seed(0)
    layers = [example("block").Block(16, Partition((3, 3)), world()).moe for _ in range(2)]
    return [weight.flatten()[0].item() for moe in layers for weight in (moe.experts.gate_eDF, moe.router.weight_ED)]


def test_experts_of_the_block_start_unlike_on_every_rank_and_in_every_layer(
    rank_pool: RankPool, examples: ModuleType
) -> None:
    """And routers alike."""
    (a, router_a, b, router_b), (c, other_a, d, other_b) = rank_pool.run(first_numbers, 2)
    assert (router_a, router_b) == (other_a, other_b)
    assert len({a, b, c, d, router_a, router_b}) == 6


@pytest.mark.usefixtures("examples")
def test_the_step_prints_what_the_readme_shows(rank_pool: RankPool) -> None:
    train = example("step").train
    lines = rank_pool.run(train, 1, 1, 1, 1) + rank_pool.run(train, 4, 2, 2, 4)
    assert lines == fences(README, "text")[1].splitlines()
    assert len({line.partition(":")[2] for line in lines}) == 1  # on 1 rank as on 4


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("README.md", "Block"),
        ("README.md", "Model"),
        ("docs/training-step.md", "SelfAttention"),
        ("docs/training-step.md", "Model"),
        ("docs/layer.md", "moe"),
        ("docs/many-nodes.md", "over_nodes"),
        ("docs/fixed-sizes.md", "of_fixed_sizes"),
    ],
)
def test_plugging_it_in_takes_less_than_20_lines(page: str, name: str) -> None:
    source = "\n\n\n".join(block.strip() for block in fences(ROOT / page, "python"))
    (shown,) = [part for part in source.split("\n\n\n") if re.match(rf"(class|def) {name}\b", part)]
    assert len([line for line in shown.splitlines() if line.strip()]) < 20


# ---- what the examples compute -------------------------------------------------------------------------


def with_every_expert(mine: GroupedExperts, partition: Partition) -> GroupedExperts:
    """All experts, each rank's own from that rank."""
    states: list[dict[str, torch.Tensor]] = [{}] * len(partition)
    dist.all_gather_object(states, mine.state_dict())
    every = GroupedExperts(partition.total, mine.dim, mine.hidden).double()
    every.load_state_dict({name: torch.cat([state[name] for state in states]) for name in states[0]})
    return every


def compare_block(rank: int) -> None:
    dim, experts = 8, Partition((2, 1, 3))
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 2)))
    block = example("block").Block(dim, experts, world()).double()  # the same seed on every rank
    torch.manual_seed(1)
    x_BLD = torch.randn(2, 5, dim, dtype=torch.float64)
    router, shared = deepcopy(block.moe.router), deepcopy(block.moe.shared)
    every = with_every_expert(block.moe.experts, experts)
    for module in (block.norm, router, shared):  # what several ranks hold is equal on them, and experts are not
        for tensor in module.state_dict().values():
            of_first = tensor.clone()
            dist.broadcast(of_first, src=0)
            assert torch.equal(tensor, of_first)
    assert not torch.equal(every.gate_eDF[0], every.gate_eDF[2])
    reference = ReferenceMoE(router=router, experts=every, shared=shared)
    wanted_BLD = x_BLD + reference(block.norm(x_BLD))[0]
    found_BlD, _ = block(sharding.shard(x_BLD, rank), sharding)
    torch.testing.assert_close(found_BlD, sharding.shard(wanted_BLD, rank), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("examples")
def test_the_block_equals_the_reference(rank_pool: RankPool) -> None:
    rank_pool.run(compare_block, 3)


def attend_in_block(rank: int) -> None:
    dim, alone = 12, nn.functional.scaled_dot_product_attention
    block = example("training_step").SelfAttention(dim, 6, 2, world()).double()  # the same seed on every rank
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 4)))
    x_BLD = torch.randn(2, 7, dim, dtype=torch.float64)
    q_BNLH, k_BGLH, v_BGLH = block.qkv(x_BLD).unflatten(-1, (10, -1)).transpose(1, 2).split([6, 2, 2], dim=1)
    whole_BNLH = alone(q_BNLH, k_BGLH, v_BGLH, is_causal=True, enable_gqa=True)
    wanted_BLD = block.out(whole_BNLH.transpose(1, 2).flatten(2))
    found_BlD = block(sharding.shard(x_BLD, rank), sharding=sharding)
    torch.testing.assert_close(found_BlD, sharding.shard(wanted_BLD, rank), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("examples")
def test_the_attention_layer_equals_one_rank(rank_pool: RankPool) -> None:
    rank_pool.run(attend_in_block, 3)
