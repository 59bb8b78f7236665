"""The MoE layer under a checkpoint: the exchanges, the plan of the forward, the same bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_dispatch import MoE, Partition, TokenSharding, TopKRouter
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.checkpoints import (
    Run,
    plainly,
    recomputed,
    recomputed_reentrantly,
    remembers_nothing,
    twice_reentrantly,
)
from tests.support.dispatch.moe import (
    DIM,
    Case,
    Outcome,
    assert_close,
    assert_equal_outcomes,
    gradients_of,
    outcome,
    pull,
)


@contextmanager
def recorded_exchanges() -> Iterator[list[str]]:
    """The all-to-alls, in order: "routing" is one run of bytes, "rows" has a row per token."""
    kinds: list[str] = []
    all_to_all_single = dist.all_to_all_single

    def recorded(out: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> Any:
        kinds.append("routing" if sent.ndim == 1 else "rows")
        return all_to_all_single(out, sent, *args, **kwargs)

    dist.all_to_all_single = recorded
    try:
        yield kinds
    finally:
        dist.all_to_all_single = all_to_all_single


def permute_second_choice(router: TopKRouter) -> list[int]:
    """Make the router answer differently from its second call on; the list has an entry per call."""
    calls: list[int] = []
    choose = router.choose

    def permuted(scores_BlE: Tensor) -> Tensor:
        calls.append(len(calls))
        return (choose(scores_BlE) + len(calls) - 1) % router.num_experts

    router.choose = permuted
    return calls


def recomputed_inside_recomputed(moe: MoE, x_BlD: Tensor, sharding: TokenSharding) -> tuple[Tensor, Tensor]:
    def outer(x_BlD: Tensor) -> tuple[Tensor, Tensor]:
        y_BlD, scores_BlE = recomputed(moe, x_BlD, sharding)
        return y_BlD * 1.0, scores_BlE * y_BlD.new_ones(1)

    return checkpoint(outer, x_BlD, use_reentrant=False)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """An outcome and the exchanges that led to it."""

    outcome: Outcome
    forward: list[str]
    backward: list[str]
    chosen: int
    forgotten: bool  # nothing of the forward is remembered after it


def traced(rank: int, case: Case, run: Run, restless: bool = False) -> Traced:
    """Forward and backward by ``run``; a ``restless`` router answers differently on its second call."""
    moe, (x_BlD, pull_BlD, pull_BlE) = case.layer(rank), case.shards(rank)
    calls = permute_second_choice(moe.router) if restless else []
    with recorded_exchanges() as forward:
        results = run(moe, x_BlD, case.sharding)
    with recorded_exchanges() as backward:
        pull(results, pull_BlD, pull_BlE).backward()
    found = outcome(moe, x_BlD, results)
    del results
    return Traced(
        outcome=found, forward=forward, backward=backward, chosen=len(calls), forgotten=remembers_nothing(moe)
    )


def recompute_cases() -> list[Case]:
    """With and without something to recompute after the last exchange; empty shards, a rank without experts."""
    return [
        Case(seq=(3, 2), experts=(2, 3)),
        Case(seq=(3, 2), experts=(2, 3), shared=False, order="LB"),
        Case(seq=(0, 4), experts=(0, 4), shared=False),
        Case(seq=(3, 0, 2), experts=(2, 2, 0), top_k=3),
        Case(seq=(5, 0), experts=(3, 3), dtype=torch.float32),
    ]


@pytest.mark.parametrize("case", recompute_cases(), ids=str)
def test_three_exchanges_forward_and_two_backward(case: Case, rank_pool: RankPool) -> None:
    for found in rank_pool.run(traced, case.ranks, case, plainly):
        assert found.forward == ["routing", "rows", "rows"]
        assert found.backward == ["rows", "rows"]


@pytest.mark.parametrize("restless", [False, True])
@pytest.mark.parametrize("case", recompute_cases(), ids=str)
def test_a_recomputation_takes_the_plan_of_its_forward(case: Case, restless: bool, rank_pool: RankPool) -> None:
    plain = rank_pool.run(traced, case.ranks, case, plainly)
    again = rank_pool.run(traced, case.ranks, case, recomputed, restless)
    # Nothing after the experts has to be recomputed (the shared ones come before), so no rows are brought back.
    exchanges = 3
    for one, other in zip(plain, again, strict=True):
        assert_equal_outcomes(other.outcome, one.outcome, 0.0)
        assert other.forward == ["routing", "rows", "rows"]
        assert other.backward == ["rows"] * exchanges
        assert other.forgotten
        assert other.chosen == restless


@pytest.mark.parametrize("run", [recomputed_reentrantly, twice_reentrantly])
@pytest.mark.parametrize("case", recompute_cases(), ids=str)
def test_a_reentrant_recomputation_takes_the_experts_of_its_forward(
    case: Case, run: Run, rank_pool: RankPool
) -> None:
    """Also one inside of another. It plans again, as its forward saw no gradients."""
    plain = rank_pool.run(traced, case.ranks, case, plainly)
    again = rank_pool.run(traced, case.ranks, case, run, True)
    for one, other in zip(plain, again, strict=True):
        assert_equal_outcomes(other.outcome, one.outcome, 0.0)  # with it the load, counted once
        assert other.backward[:3] == ["routing", "rows", "rows"]
        assert other.chosen == 1
        assert other.forgotten


def refusal_of_nested_checkpoints(rank: int, case: Case) -> str:
    moe, (x_BlD, _, _) = case.layer(rank), case.shards(rank)
    y_BlD, _ = recomputed_inside_recomputed(moe, x_BlD, case.sharding)
    try:
        y_BlD.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_checkpoint_inside_a_checkpoint_is_refused_before_it_routes_again(rank_pool: RankPool) -> None:
    case = recompute_cases()[0]
    for text in rank_pool.run(refusal_of_nested_checkpoints, case.ranks, case):
        assert text.startswith("an MoE layer inside a checkpoint inside a checkpoint: the recomputation of the outer")


def all_scores_tie(rank: int, case: Case, run: Run) -> Outcome:
    moe, (x_BlD, pull_BlD, pull_BlE) = case.layer(rank), case.shards(rank)
    with torch.no_grad():
        moe.router.weight_ED.zero_()
        moe.router.expert_bias_E.zero_()
    results = run(moe, x_BlD, case.sharding)
    pull(results, pull_BlD, pull_BlE).backward()
    return outcome(moe, x_BlD, results)


def test_ties_are_broken_once(rank_threads: RankThreads) -> None:
    case = Case(seq=(3, 2), experts=(2, 3))
    plain = rank_threads.run(all_scores_tie, 2, case, plainly)
    for one, other in zip(plain, rank_threads.run(all_scores_tie, 2, case, recomputed), strict=True):
        assert_equal_outcomes(other, one, 0.0)


def two_forwards(rank: int, run: Run, backward: tuple[int, int]) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """One layer, two batches, backwards in the given order: input gradients, parameter gradients, choices made."""
    case = Case(seq=(3, 2), experts=(2, 3))
    moe = case.layer(rank)
    calls = permute_second_choice(moe.router)
    shardings = [case.sharding, TokenSharding(batch=2, seq=Partition((0, 6)))]
    batches = [
        torch.randn(*sharding.local_shape(rank), DIM, dtype=torch.float64, requires_grad=True)
        for sharding in shardings
    ]
    losses = [run(moe, x_BlD, sharding)[0].square().sum() for x_BlD, sharding in zip(batches, shardings, strict=True)]
    for index in backward:
        losses[index].backward()
    grads = [x_BlD.grad for x_BlD in batches if x_BlD.grad is not None]
    return grads, gradients_of(moe), len(calls)


@pytest.mark.parametrize("backward", [(0, 1), (1, 0)])
def test_two_forwards_before_their_backwards_keep_their_plans(
    backward: tuple[int, int], rank_threads: RankThreads
) -> None:
    plain = rank_threads.run(two_forwards, 2, plainly, (0, 1))
    again = rank_threads.run(two_forwards, 2, recomputed, backward)
    for (want_grads, want_gradients, _), (grads, gradients, calls) in zip(plain, again, strict=True):
        assert calls == 2
        assert len(grads) == 2
        for got, want in zip(grads, want_grads, strict=True):
            assert_close(got, want, 0.0, "dx")
        for name in want_gradients:  # two gradients, added in either order
            assert_close(gradients[name], want_gradients[name], 1e-12, name)


class Block(nn.Module):
    """norm, MoE, residual; the MoE ``times`` times."""

    def __init__(self, moe: MoE, times: int) -> None:
        super().__init__()
        self.norm, self.moe, self.times = nn.RMSNorm(DIM, dtype=torch.float64), moe, times

    def forward(self, x_BlD: Tensor, sharding: TokenSharding) -> Tensor:
        for _ in range(self.times):
            x_BlD = x_BlD + self.moe(self.norm(x_BlD), sharding=sharding)[0]
        return x_BlD


def checkpointed(block: Block, x_BlD: Tensor, sharding: TokenSharding, reentrant: bool) -> Tensor:
    return checkpoint(block, x_BlD, sharding, use_reentrant=reentrant)  # pyright: ignore[reportReturnType]


def run_block(
    rank: int, times: int, how: Literal["plain", "reentrant", "not reentrant"], backwards: int
) -> tuple[Tensor, dict[str, Tensor], int, bool]:
    """dx, gradients, choices made, and whether nothing is remembered."""
    case = Case(seq=(3, 0, 2), experts=(2, 0, 3))
    block, (x_BlD, pull_BlD, _) = Block(case.layer(rank), times), case.shards(rank)
    calls: list[int] = []
    choose = block.moe.router.choose

    def answer(scores_BlE: Tensor) -> Tensor:  # each of the forward's calls has its own answer, later ones another
        calls.append(len(calls))
        return (choose(scores_BlE) + len(calls)) % block.moe.router.num_experts

    block.moe.router.choose = answer
    if how == "plain":
        y_BlD = block(x_BlD, case.sharding)
    else:
        y_BlD = checkpointed(block, x_BlD, case.sharding, how == "reentrant")
    for backward in range(backwards):
        (y_BlD * pull_BlD).sum().backward(retain_graph=backward + 1 < backwards)
    assert x_BlD.grad is not None
    del y_BlD
    return x_BlD.grad, gradients_of(block), len(calls), remembers_nothing(block.moe)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_checkpointed_block_and_a_kept_graph(
    times: int, backwards: int, how: Literal["reentrant", "not reentrant"], rank_threads: RankThreads
) -> None:
    plain = rank_threads.run(run_block, 3, times, "plain", 1)
    again = rank_threads.run(run_block, 3, times, how, backwards)
    for (dx_BlD, gradients, _, _), (got_dx_BlD, got, calls, forgotten) in zip(plain, again, strict=True):
        assert calls == times
        assert forgotten
        assert_close(got_dx_BlD, backwards * dx_BlD, 1e-12, "dx")
        assert got.keys() == gradients.keys()
        for name, want in gradients.items():
            assert_close(got[name], backwards * want, 1e-12, name)
