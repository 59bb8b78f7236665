"""A model of anybody's against itself in one process, and what is said of the mistakes that people make."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from moe_dispatch import ParallelMesh
from moe_dispatch.testing import Comparison, Layout, RankPool, compare_with_one_process
from tests.support.judge.small import Model, Small
from tests.support.ranks import refusal

LAYOUT = Layout(dp=2, sp=2, ep=2, batch=3, seq=7)


def compared(rank: int, subject: Small, layout: Layout, dtype: torch.dtype) -> Comparison:
    return compare_with_one_process(subject, layout, dtype)


def on_ranks(
    pool: RankPool, subject: Small, layout: Layout = LAYOUT, dtype: torch.dtype = torch.float64
) -> Comparison:
    first, *others = pool.run(compared, layout.ranks, subject, layout, dtype)
    assert all(str(other) == str(first) for other in others)  # a NaN is not equal to itself
    return first


@pytest.mark.parametrize(
    ("layout", "dtype", "order"),
    [
        (LAYOUT, torch.float64, "BL"),
        (LAYOUT, torch.float32, "LB"),
        (Layout(sp=4, ep=4, batch=2, seq=3), torch.float64, "LB"),  # a rank without tokens
        (Layout(dp=4, ep=2, batch=2, seq=5), torch.float64, "BL"),  # two ranks without rows
        (replace(LAYOUT, order="zigzag"), torch.float64, "BL"),
        (replace(LAYOUT, order="striped", stripe=2), torch.float64, "LB"),
    ],
    ids=str,
)
def test_a_right_model_agrees(rank_pool: RankPool, layout: Layout, dtype: torch.dtype, order: str) -> None:
    found = on_ranks(rank_pool, Small(order=order), layout, dtype)
    assert found.agrees, str(found)
    assert found.words == ()
    limit = 6e-15 if dtype == torch.float64 else 2e-6
    assert max(difference.value for difference in found.differences) < limit  # measured: 6e-16 and 5e-7


def test_parameters_keep_their_names_inside_of_wrappers(rank_pool: RankPool) -> None:
    assert on_ranks(rank_pool, Small(is_wrapped=True)).agrees


class Frozen(Small):
    """Its positions do not learn, here and there; or, by mistake, over ranks only."""

    def whole(self, layout: Layout) -> Model:
        model = super().whole(layout)
        model.position.weight.requires_grad_(bool(self.mistake))
        return model

    def share(self, whole: nn.Module, layout: Layout, mesh: ParallelMesh) -> Model:
        model = super().share(whole, layout, mesh)
        model.position.weight.requires_grad_(False)
        return model


def test_what_does_not_learn_has_no_gradient_in_both(rank_pool: RankPool) -> None:
    assert on_ranks(rank_pool, Frozen()).agrees
    found = on_ranks(rank_pool, Frozen("frozen over ranks"))
    assert "gradients of position.weight are 0: no gradient comes back to them" in found.words


@pytest.mark.parametrize(
    ("mistake", "quantities", "words"),
    [
        (
            "averaged",
            {"gradients", "loss curve"},
            [
                "gradients of token.weight, position.weight, qkv.weight and 4 more are 1/4 (ranks) of the reference: "
                "averaged over ranks instead of summed"
            ],
        ),
        (
            "experts too often",
            {"gradients", "loss curve"},
            [
                "gradients of moe.experts.gate_eDF, moe.experts.up_eDF, moe.experts.down_eFD are 2 (dp or sp or ep) "
                "times too large: summed over ranks that hold the same"
            ],
        ),
        (
            "whole loss",
            {"loss", "loss curve"},
            ["the loss is 4 (ranks) times that of one process: each share is the whole, or a mean of fewer tokens"],
        ),
        (
            "positions from zero",
            {"logits", "loss", "gradients", "loss curve"},
            ["logits agree on the tokens of ranks 0, 2 only"],
        ),
        (
            "router cut off",
            {"gradients", "loss curve"},
            ["gradients of moe.router.weight_ED are not there: nothing reached these parameters"],
        ),
    ],
)
def test_a_mistake_is_told_in_words(
    rank_pool: RankPool, mistake: str, quantities: set[str], words: list[str]
) -> None:
    found = on_ranks(rank_pool, Small(mistake))
    assert {difference.quantity for difference in found.differences if not difference.agrees} == quantities
    assert list(found.words)[: len(words)] == words
    lines = str(found).splitlines()
    assert lines[-len(found.words) :] == list(found.words)
    assert re.fullmatch(r"logits: off by \S+ \(\w+: 1e-12\), most at row \d, position \d", lines[0])


def test_an_order_that_is_taken_for_contiguous_shards_is_told(rank_pool: RankPool) -> None:
    mistake = "positions of contiguous shards"
    assert on_ranks(rank_pool, Small(mistake)).agrees
    assert on_ranks(rank_pool, Small(mistake), replace(LAYOUT, order="zigzag")).words == (
        "logits agree at the first 2 places of each row, as far as the order of tokens is that of contiguous shards: "
        "it is taken for theirs, e.g. in positions",
    )


class WithoutShare:
    def whole(self, layout: Layout) -> None: ...

    def step_whole(self, model: Any, token_BL: Any) -> None: ...


def refusals(rank: int) -> list[str]:
    wrong: Any = WithoutShare()
    return [
        refusal(lambda: compare_with_one_process(Small(), LAYOUT, torch.bfloat16)),
        refusal(lambda: compare_with_one_process(Small("another parameter"), LAYOUT, torch.float64)),
        refusal(lambda: compare_with_one_process(Small(), Layout(dp=3, batch=3, seq=7), torch.float64)),
        refusal(lambda: compare_with_one_process(wrong, LAYOUT, torch.float64)),
    ]


def test_what_cannot_be_compared_is_refused_on_every_rank(rank_pool: RankPool) -> None:
    first, *others = rank_pool.run(refusals, 4)
    assert others == [first] * 3
    dtype, parameter, mesh, subject = first
    assert dtype == ("dtype is torch.bfloat16; only float64 and float32 have limits that rounding does not reach")
    assert parameter == (
        "rank 2: the share has other parameters than the whole: none missing, extra that the whole has not; "
        "parameters keep their names in a share"
    )
    assert mesh.startswith("dp=3 x sp=1 x tp=1 is 3 ranks, but there are 4; ")
    assert subject == (
        "WithoutShare cannot be judged: it has no share(whole, layout, mesh); "
        "its step_whole(model: Any, token_BL: Any) -> None has to be step_whole(model, token_BL, layout); "
        "it has no step_share(model, token_BL, layout, mesh); "
        "it has no whole_gradient(name, gradient, layout, mesh); see moe_dispatch.testing.Subject"
    )
