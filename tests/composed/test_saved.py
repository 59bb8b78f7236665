"""Modules saved whole, by torch.save: without their group, which is set after loading."""

import io
from typing import Any

import pytest
import torch
from torch import nn

from moe_dispatch import StaticSizes
from moe_dispatch.plan.planner import Planner
from moe_dispatch.testing import RankThreads
from sp_attention import AttentionOverRanks, Scheme, UlyssesAttention
from tests.support.dispatch.moe import COUNTED, Case, Outcome, assert_equal_outcomes, run_moe
from tests.support.dispatch.plans import planner_of
from tests.support.ranks import refusal, world

CASE = Case(seq=(3, 0), experts=(2, 3))


def loaded(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def layers(rank: int, planner: Planner) -> tuple[str, Outcome, Outcome]:
    """The refusal of a loaded layer without a group, its outcome with one, and that of the original."""
    moe = CASE.layer(rank, planner=planner)
    copy = loaded(moe)
    x_BlD, _, _ = CASE.shards(rank)
    text = refusal(lambda: copy(x_BlD, sharding=CASE.sharding))
    copy.group = world()
    return text, run_moe(rank, CASE, copy), run_moe(rank, CASE, moe)


@pytest.mark.parametrize("planner", [COUNTED, StaticSizes(rows_per_pair=6, rows=12)])
def test_a_layer(rank_threads: RankThreads, planner: Planner) -> None:
    for text, copied, original in rank_threads.run(layers, 2, planner):
        assert text.startswith("group is not in the file that this MoE was loaded from (set its attribute .group); ")
        assert_equal_outcomes(copied, original, 0.0)


def refused(rank: int) -> str:
    with planner_of("hierarchical", rank, CASE.sizes) as planner:
        moe = Case(seq=(3, 0, 1, 1), experts=(2, 3, 1, 1)).layer(rank, planner=planner)
        with pytest.raises(TypeError) as error:
            torch.save(moe, io.BytesIO())
    return str(error.value)


def test_groups_of_nodes_are_refused(rank_threads: RankThreads) -> None:
    for text in rank_threads.run(refused, 4):
        assert text.startswith("NodeGroups hold process groups, which no file can hold; set planner = Counted()")


def attentions(rank: int, kind: type[AttentionOverRanks], choices: dict[str, Any]) -> tuple[str, float]:
    sharding, qkv = CASE.sharding, [torch.randn(2, (3, 0)[rank], 2, 4) for _ in range(3)]
    attention = kind(group=world(), is_causal=True, **choices)
    copy = loaded(attention)
    text = refusal(lambda: copy(*qkv, sharding=sharding))
    copy.group = world()
    return text, float((copy(*qkv, sharding=sharding) - attention(*qkv, sharding=sharding)).abs().sum())


@pytest.mark.parametrize(
    ("kind", "choices"),
    [(UlyssesAttention, {}), (AttentionOverRanks, {"scheme": Scheme.ring(keep=True, chunk=2), "window": (1, 0)})],
)
def test_attention(rank_threads: RankThreads, kind: type[AttentionOverRanks], choices: dict[str, Any]) -> None:
    for text, off in rank_threads.run(attentions, 2, kind, choices):
        assert f"not in the file that this {kind.__name__} was loaded from" in text
        assert off == 0.0
