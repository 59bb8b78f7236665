"""What an MoE layer keeps: the load of its experts and the bias that follows, its state dict, deep copies."""

import copy
import io
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dispatch.testing import RankThreads
from tests.support.dispatch.checkpoints import recomputed, recomputed_reentrantly
from tests.support.dispatch.moe import (
    Case,
    Outcome,
    assert_equal_outcomes,
    one_process,
    outcome,
    pull,
    run_layer,
    together,
)
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


def test_choices_are_counted_once_and_only_in_training(rank_threads: RankThreads) -> None:
    found = rank_threads.run(loads, 2)
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
def test_the_bias_moves_as_in_one_process(case: Case, rank_threads: RankThreads) -> None:
    reference, want = case.reference(), []
    for step in range(3):
        reference(replace(case, seed=step).inputs()[0])
        reference.update_bias(0.05)
        want.append(reference.router.expert_bias_E.tolist())
    assert want[0] != want[1] != want[2]
    for found in rank_threads.run(biases, case.ranks, case):
        assert found == [pytest.approx(bias, rel=1e-12) for bias in want]


# ---- state dict and copies -------------------------------------------------------------------------


def state_and_copy(rank: int) -> tuple[list[str], Outcome, Outcome, bool]:
    """Names of the state dict; the outcome of a deep copy and of the original; whether the copy shares nothing."""
    case = Case(seq=(3, 2), experts=(2, 3))
    moe, (x_BlD, pull_BlD, pull_BlE) = case.layer(rank), case.shards(rank)
    copied = copy.deepcopy(moe)
    results = copied(x_BlD, sharding=case.sharding)
    pull(results, pull_BlD, pull_BlE).backward()
    apart = copied.group is moe.group and all(p.grad is None for p in moe.parameters())
    return list(moe.state_dict()), outcome(copied, x_BlD, results), run_layer(rank, case), apart


def test_a_deep_copy_computes_the_same(rank_threads: RankThreads) -> None:
    for _, copied, original, apart in rank_threads.run(state_and_copy, 2):
        assert apart
        assert_equal_outcomes(copied, original, 0.0)


def saved_state(rank: int, case: Case) -> bytes:
    """This rank's state dict as a file, after a step that moved everything in it."""
    moe = case.layer(rank)
    moe(case.shards(rank)[0], sharding=case.sharding)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.mul_(1.5)
    moe.update_bias(0.25, world())
    file = io.BytesIO()
    torch.save(moe.state_dict(), file)
    return file.getvalue()


def run_loaded(rank: int, case: Case, state: dict[str, Tensor]) -> tuple[Outcome, dict[str, Tensor]]:
    """The outcome of a fresh layer, after it loaded its part of ``state``; and its state dict."""
    moe, (x_BlD, pull_BlD, pull_BlE) = replace(case, seed=99).layer(rank), case.shards(rank)
    moe.load_state_dict(case.mine(state, rank))
    results = moe(x_BlD, sharding=case.sharding)
    pull(results, pull_BlD, pull_BlE).backward()
    return outcome(moe, x_BlD, results), {name: value.clone() for name, value in moe.state_dict().items()}


def whole_state(files: Sequence[bytes]) -> dict[str, Tensor]:
    """The state dict with all experts, in the order of the ranks."""
    states = [torch.load(io.BytesIO(file)) for file in files]
    return {
        name: torch.cat([state[name] for state in states]) if ".experts." in f".{name}" else states[0][name]
        for name in states[0]
    }


@pytest.mark.parametrize(
    ("seq", "experts"), [((5,), (6,)), ((3, 2), (1, 5)), ((2, 1, 0, 2), (2, 2, 2, 0)), ((1, 1, 1, 2), (2, 1, 2, 1))]
)
def test_what_two_ranks_saved_any_number_of_ranks_loads(
    seq: tuple[int, ...], experts: tuple[int, ...], rank_threads: RankThreads
) -> None:
    saved = Case(seq=(3, 2), experts=(3, 3))
    state = whole_state(rank_threads.run(saved_state, 2, saved))
    assert set(state) == {
        "router.weight_ED", "router.expert_bias_E", "experts.gate_eDF", "experts.up_eDF", "experts.down_eFD",
        "shared.gate.weight", "shared.up.weight", "shared.down.weight",
    }  # fmt: skip
    case = Case(seq=seq, experts=experts)
    outcomes, states = zip(*rank_threads.run(run_loaded, case.ranks, case, state), strict=True)
    for name, want in state.items():
        parts = [one[name] for one in states]
        for got in [torch.cat(parts)] if name.startswith("experts.") else parts:
            assert torch.equal(got, want), name
    reference, (x_BLD, pull_BLD, pull_BLE) = case.reference(), case.inputs()
    reference.load_state_dict(state)
    results = reference(x_BLD.requires_grad_())
    pull(results, pull_BLD, pull_BLE).backward()
    assert_equal_outcomes(together(case, outcomes), outcome(reference, x_BLD, results), 1e-12)
