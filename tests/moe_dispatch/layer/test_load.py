"""How often the experts were chosen, and the bias that follows from it."""

from dataclasses import replace

import pytest
import torch

from moe_dispatch.testing import RankPool
from tests.support.checkpoints import recomputed, recomputed_reentrantly
from tests.support.moe import Case, one_process
from tests.support.ranks import world


def loads(rank: int) -> list[list[int]]:
    """load_E after training, evaluation, a checkpointed step, a bias update, and one more forward."""
    case = Case(seq=(3, 2), experts=(2, 2))
    moe, (x_BlD, _, _) = case.layer(rank), case.shards(rank)
    found = []

    def note() -> None:
        found.append(moe.load_E.tolist())

    moe(x_BlD, sharding=case.sharding)
    note()
    moe.eval()
    moe(x_BlD, sharding=case.sharding)
    recomputed(moe, x_BlD, case.sharding)[0].sum().backward()
    note()
    moe.train()
    recomputed(moe, x_BlD, case.sharding)[0].sum().backward()
    note()
    moe.update_bias(0.0, world())
    note()
    recomputed_reentrantly(moe, x_BlD, case.sharding)[0].sum().backward()
    note()
    assert moe.load_E.dtype == torch.int64
    return found


def test_choices_are_counted_once_and_only_in_training(rank_pool: RankPool) -> None:
    found = rank_pool.run(loads, 2)
    for (once, evaluated, twice, updated, reentrant), tokens in zip(found, (6, 4), strict=True):
        assert sum(once) == 2 * tokens
        assert evaluated == once
        assert twice == [2 * count for count in once]
        assert updated == [0] * 4
        assert reentrant == once
    case = Case(seq=(3, 2), experts=(2, 2))
    assert [sum(counts) for counts in zip(*(one[0] for one in found), strict=True)] == one_process(case).load


def test_the_reference_counts_in_training_and_starts_anew_after_an_update() -> None:
    case = Case(seq=(5,), experts=(4,))
    reference, (x_BLD, _, _) = case.reference(), case.inputs()
    reference(x_BLD)
    assert sum(reference.load_E) == 2 * 10
    reference.eval()(x_BLD)
    assert sum(reference.load_E) == 2 * 10
    reference.update_bias(0.05)
    assert reference.load_E == [0] * 4


def biases(rank: int, case: Case) -> list[list[float]]:
    """The bias after each of three steps on different tokens."""
    moe, found = case.layer(rank), []
    for step in range(3):
        x_BlD, _, _ = replace(case, seed=step).shards(rank)
        moe(x_BlD, sharding=case.sharding)
        moe.update_bias(0.05, world())
        found.append(moe.router.expert_bias_E.tolist())
    return found


@pytest.mark.parametrize(
    "case", [Case(seq=(5,), experts=(4,)), Case(seq=(4, 0), experts=(1, 3)), Case(seq=(3, 0, 2), experts=(0, 2, 2))]
)
def test_the_bias_moves_as_in_one_process(case: Case, rank_pool: RankPool) -> None:
    reference, want = case.reference(), []
    for step in range(3):
        reference(replace(case, seed=step).inputs()[0])
        reference.update_bias(0.05)
        want.append(reference.router.expert_bias_E.tolist())
    assert want[0] != want[1] != want[2]
    for found in rank_pool.run(biases, case.ranks, case):
        assert found == [pytest.approx(bias, rel=1e-12) for bias in want]
