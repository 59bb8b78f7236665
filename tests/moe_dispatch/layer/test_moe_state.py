"""The state dict of an MoE layer, and its deep copy."""

import copy
import io
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dispatch.testing import RankPool
from tests.support.moe import (
    Case,
    Outcome,
    assert_equal_outcomes,
    outcome,
    pull,
    run_layer,
    together,
)
from tests.support.ranks import world


def state_and_copy(rank: int) -> tuple[list[str], Outcome, Outcome, bool]:
    """Names of the state dict; the outcome of a deep copy and of the original; whether the copy shares nothing."""
    case = Case(seq=(3, 2), experts=(2, 3))
    moe, (x_BlD, pull_BlD, pull_BlE) = case.layer(rank), case.shards(rank)
    copied = copy.deepcopy(moe)
    results = copied(x_BlD, sharding=case.sharding)
    pull(results, pull_BlD, pull_BlE).backward()
    apart = copied.group is moe.group and all(p.grad is None for p in moe.parameters())
    return list(moe.state_dict()), outcome(copied, x_BlD, results), run_layer(rank, case), apart


def test_a_deep_copy_computes_the_same(rank_pool: RankPool) -> None:
    for _, copied, original, apart in rank_pool.run(state_and_copy, 2):
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
    seq: tuple[int, ...], experts: tuple[int, ...], rank_pool: RankPool
) -> None:
    saved = Case(seq=(3, 2), experts=(3, 3))
    state = whole_state(rank_pool.run(saved_state, 2, saved))
    assert set(state) == {
        "router.weight_ED", "router.expert_bias_E", "experts.gate_eDF", "experts.up_eDF", "experts.down_eFD",
        "shared.gate.weight", "shared.up.weight", "shared.down.weight",
    }  # fmt: skip
    case = Case(seq=seq, experts=experts)
    outcomes, states = zip(*rank_pool.run(run_loaded, case.ranks, case, state), strict=True)
    for name, want in state.items():
        parts = [one[name] for one in states]
        for got in [torch.cat(parts)] if name.startswith("experts.") else parts:
            assert torch.equal(got, want), name
    reference, (x_BLD, pull_BLD, pull_BLE) = case.reference(), case.inputs()
    reference.load_state_dict(state)
    results = reference(x_BLD.requires_grad_())
    pull(results, pull_BLD, pull_BLE).backward()
    assert_equal_outcomes(together(case, outcomes), outcome(reference, x_BLD, results), 1e-12)
