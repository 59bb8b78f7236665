"""Padding that goes nowhere, and choices made elsewhere, against the reference in one process."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import sequence_balance_loss
from moe_dispatch.reference import reference_balance_loss
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.checkpoints import Run, plainly, recomputed, recomputed_reentrantly
from tests.support.dispatch.moe import TOLERANCE, Case, Outcome, assert_equal_outcomes, outcome, pull, together
from tests.support.dispatch.plans import KINDS, Kind, planner_of
from tests.support.ranks import refusal, world

pytestmark = pytest.mark.usefixtures("uncovered")

CASES = [
    Case(seq=(3, 1, 0, 2), experts=(2, 2, 2, 2), top_k=3),
    Case(seq=(3, 2), batch=(2, 1), experts=(3, 0, 2, 1), order="LB", score="softmax"),
    Case(seq=(4, 0, 0, 3), batch=(3,), experts=(0, 0, 5, 0), shared=False, normalize=False, dtype=torch.float32),
]
GIVEN = [(True, False), (False, True), (True, True)]


@cache
def real_of(case: Case) -> Tensor:
    """One row is padding altogether, and the first rank's tokens are."""
    real_BL = torch.ones(case.sharding.global_shape, dtype=torch.bool)
    batch_first = real_BL if case.order == "BL" else real_BL.T
    batch_first[1, :] = False
    batch_first[:, 0] = False
    first = case.sharding.shard(real_BL, 0)
    first.fill_(False)
    return real_BL


@cache
def ids_of(case: Case) -> Tensor:
    """The experts of each token, some of them none, one twice."""
    draw = torch.Generator().manual_seed(7)
    size = (*case.sharding.global_shape, case.top_k)
    expert_BLK = torch.randint(-1, case.partition.total, size, generator=draw)
    expert_BLK.view(-1, case.top_k)[-1] = case.partition.total - 1
    return expert_BLK


def arguments(case: Case, padded: bool, given: bool) -> dict[str, Tensor]:
    whole = {"real": real_of(case)} if padded else {}
    return whole | {"expert": ids_of(case)} if given else whole


def spoiled(case: Case, x_BLD: Tensor, padded: bool) -> Tensor:
    """NaN at padding."""
    return x_BLD.masked_fill(~real_of(case).unsqueeze(-1), torch.nan) if padded else x_BLD


def on_ranks(rank: int, case: Case, kind: Kind, padded: bool, given: bool, run: Run) -> tuple[Outcome, Tensor]:
    """The outcome, and the rank's share of the balance loss, which is in it."""
    x_BLD, *pulls = case.inputs()
    x_BlD, *pulls = (case.sharding.shard(whole, rank).clone() for whole in (spoiled(case, x_BLD, padded), *pulls))
    mine = {name: case.sharding.shard(whole, rank) for name, whole in arguments(case, padded, given).items()}
    if "expert" in mine and rank == 1:
        mine["expert"] = mine["expert"].to(torch.int32)
    names = {"real": "real_Bl", "expert": "expert_BlK"}
    x_BlD.requires_grad_()
    with planner_of(kind, rank, case.sizes) as planner:
        moe = case.layer(rank, planner=planner)

        class Called:
            """The layer with these arguments, as the ways to run it call it."""

            def __call__(self, x_BlD: Tensor, *, sharding: Any) -> tuple[Tensor, Tensor]:
                return moe(x_BlD, sharding=sharding, **{names[name]: x for name, x in mine.items()})

        results = run(Called(), x_BlD, case.sharding)  # pyright: ignore[reportArgumentType]
        share = sequence_balance_loss(results[1], top_k=case.top_k, sharding=case.sharding, group=world())
        (pull(results, *pulls) + share).backward()
        moe.check()
        return outcome(moe, x_BlD, results), share.detach()


@cache
def one_process(case: Case, padded: bool, given: bool) -> tuple[Outcome, Tensor]:
    reference, (x_BLD, *pulls) = case.reference(), case.inputs()
    x_BLD.requires_grad_()
    results = reference(
        x_BLD, **{f"{name}_BL{'K' * (name == 'expert')}": x for name, x in arguments(case, padded, given).items()}
    )
    scores_BLE = results[1] if case.order == "BL" else results[1].transpose(0, 1)
    loss = reference_balance_loss(scores_BLE, case.top_k)
    (pull(results, *pulls) + loss).backward()
    return outcome(reference, x_BLD, results), loss.detach()


@pytest.mark.parametrize(("padded", "given"), GIVEN)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_given_ids_equal_one_process(
    rank_threads: RankThreads, kind: Kind, case: Case, padded: bool, given: bool
) -> None:
    outcomes, shares = zip(*rank_threads.run(on_ranks, 4, case, kind, padded, given, plainly), strict=True)
    wanted, loss = one_process(case, padded, given)
    assert_equal_outcomes(together(case, outcomes), wanted, TOLERANCE[case.dtype])
    assert torch.stack(shares).sum().item() == pytest.approx(loss.item(), rel=TOLERANCE[case.dtype])
    if padded:
        real_BL = real_of(case)
        assert sum(wanted.load) <= case.top_k * int(real_BL.sum())
        assert not together(case, outcomes).dx_BlD[~real_BL].any()


@pytest.mark.parametrize("run", [recomputed, recomputed_reentrantly])
def test_recomputed(rank_threads: RankThreads, run: Run) -> None:
    outcomes, _ = zip(*rank_threads.run(on_ranks, 4, CASES[0], "counted", True, True, run), strict=True)
    assert_equal_outcomes(together(CASES[0], outcomes), one_process(CASES[0], True, True)[0], 1e-12)


WRONG = Case(seq=(3, 0, 2), experts=(2, 2, 2))
MISTAKES = {
    "no mask": (
        "real_Bl is (2, 3) of torch.int64; for these tokens it has to be (2, 3) of torch.bool",
        {"real_Bl": torch.ones(2, 3, dtype=torch.int64)},
    ),
    "a mask of the whole": (
        "real_Bl is (2, 5) of torch.bool; for these tokens it has to be (2, 3) of torch.bool",
        {"real_Bl": torch.ones(2, 5, dtype=torch.bool)},
    ),
    "a choice too many": (
        "expert_BlK is (2, 3, 3) of torch.int64; for these tokens it has to be (2, 3, 2) of torch.int64 or "
        "torch.int32",
        {"expert_BlK": torch.zeros(2, 3, 3, dtype=torch.int64)},
    ),
    "another device": (
        "real_Bl is on meta, but x on cpu; move it there",
        {"real_Bl": torch.ones(2, 3, dtype=torch.bool, device="meta")},
    ),
    "no such expert": (
        "expert id 6 at local token 0, choice 0; ids are 0 to 5, or -1 for no expert",
        {"expert_BlK": torch.full((2, 3, 2), 6)},
    ),
}


def refused(rank: int, mistake: str) -> tuple[str, int]:
    """The text on every rank; the layer works on."""
    moe, (x_BlD, _, _) = WRONG.layer(rank), WRONG.shards(rank)
    wrong = MISTAKES[mistake][1] if rank == 0 else {}
    text = refusal(lambda: moe(x_BlD, sharding=WRONG.sharding, **wrong))
    moe(x_BlD, sharding=WRONG.sharding)
    return text, int(moe.load_E.sum())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_ranks_mistake_is_told_on_every_rank(rank_pool: RankPool, mistake: str) -> None:
    texts, counted = zip(*rank_pool.run(refused, 3, mistake), strict=True)
    assert set(texts) == {f"rank 0: {MISTAKES[mistake][0]}"}
    assert sum(counted) == 2 * 5 * 2


def biased(rank: int) -> Tensor:
    """Shared experts with a bias give something for zeros too."""
    case = Case(seq=(3, 2), experts=(2, 3))
    moe, (x_BlD, _, _) = case.layer(rank), case.shards(rank)
    moe.shared = torch.nn.Linear(x_BlD.shape[-1], x_BlD.shape[-1], dtype=x_BlD.dtype)
    real_Bl = torch.zeros(x_BlD.shape[:2], dtype=torch.bool)
    y_BlD, scores_BlE = moe(x_BlD, sharding=case.sharding, real_Bl=real_Bl)
    return y_BlD.abs().sum() + scores_BlE.abs().sum() + moe.load_E.sum()


def test_nothing_but_padding_gives_nothing(rank_threads: RankThreads) -> None:
    assert [found.item() for found in rank_threads.run(biased, 2)] == [0.0, 0.0]
