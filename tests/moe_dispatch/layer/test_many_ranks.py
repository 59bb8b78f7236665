"""The MoE layer with each kind of plan equals one process, on ranks that are threads: up to 64, also recomputed."""

from dataclasses import replace

import pytest

from moe_dispatch import MoE, StaticSizes, StaticSizesError
from moe_dispatch.testing import RankThreads
from tests.support.dispatch.checkpoints import Run, plainly, recomputed, recomputed_reentrantly
from tests.support.dispatch.moe import CASES, Case, Outcome, assert_equal_outcomes, assert_like_one_process, run_moe
from tests.support.dispatch.plans import KINDS, Kind, planner_of
from tests.support.ranks import refusal

pytestmark = pytest.mark.usefixtures("uncovered")


def run_planned(rank: int, case: Case, kind: Kind, run: Run) -> Outcome:
    with planner_of(kind, rank, case.sizes) as planner:
        moe = case.layer(rank, planner=planner)
        found = run_moe(rank, case, moe, run)
        moe.check()
        return found


OF_TWO_NODES = [case for case in CASES if case.ranks in (2, 4)]


@pytest.mark.parametrize("kind", ["static", "hierarchical", "by counts"])
@pytest.mark.parametrize("case", OF_TWO_NODES, ids=str)
def test_any_plan_equals_one_process(rank_threads: RankThreads, case: Case, kind: Kind) -> None:
    assert_like_one_process(case, rank_threads.run(run_planned, case.ranks, case, kind, plainly))


def of_many(name: str, ranks: int) -> Case:
    """Shards and experts that are as unlike as so many ranks allow."""
    before, behind = (0,) * (ranks // 3), (0,) * (ranks - 1 - ranks // 3)
    if name == "uneven":
        return Case(seq=(3, 0, 1, 2) * (ranks // 4), experts=(1, 2, 0, 1) * (ranks // 4), top_k=3)
    if name == "one rank with all tokens":
        seq = (*before, 30, *behind)
        return Case(seq=seq, experts=(1,) * ranks, order="LB", groups=4, limited_groups=2)
    return Case(seq=(1,) * ranks, experts=(*before, 6, *behind), score="softmax", shared=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["uneven", "one rank with all tokens", "one rank with all experts"])
@pytest.mark.parametrize("ranks", [16, 64])
def test_many_ranks_equal_one_process(rank_threads: RankThreads, ranks: int, name: str, kind: Kind) -> None:
    case = of_many(name, ranks)
    assert_like_one_process(case, rank_threads.run(run_planned, ranks, case, kind, plainly))


@pytest.mark.parametrize("run", [recomputed, recomputed_reentrantly])
@pytest.mark.parametrize("kind", ["static", "hierarchical", "by counts"])
@pytest.mark.parametrize("case", [CASES[3], CASES[12], CASES[14]], ids=str)
def test_a_recomputation_with_any_plan_gives_the_same_bits(
    rank_threads: RankThreads, case: Case, kind: Kind, run: Run
) -> None:
    plain, again = (rank_threads.run(run_planned, case.ranks, case, kind, way) for way in (plainly, run))
    for one, other in zip(plain, again, strict=True):
        assert_equal_outcomes(other, one, 0.0)  # with it the load, counted once


def run_too_small(rank: int, case: Case) -> tuple[list[bool], str, Outcome]:
    """Whether outputs are NaN, what ``check`` says, and a right step of the same layer afterwards."""
    moe = case.layer(rank, planner=StaticSizes(rows_per_pair=100, rows=case.sharding.num_tokens))
    y_BlD, _ = moe(case.shards(rank)[0], sharding=case.sharding)
    moe(case.shards(rank)[0], sharding=case.sharding)  # the report of several plans is one
    with pytest.raises(StaticSizesError) as error:
        moe.check()
    moe.check()  # told once
    moe.planner = case.sizes
    moe.load_E.zero_()
    return y_BlD.isnan().flatten().tolist(), str(error.value), run_moe(rank, case, moe)


def test_sizes_that_are_too_small_are_told_once_on_every_rank(rank_threads: RankThreads) -> None:
    case = Case(seq=(3, 0, 2), experts=(0, 5, 0))
    assert case.top_k == 2
    nans, texts, outcomes = zip(*rank_threads.run(run_too_small, 3, case), strict=True)
    assert all(all(of_rank) for of_rank in nans)
    assert sum(map(len, nans)) == case.sharding.num_tokens * 8
    assert len(set(texts)) == 1
    assert "20 " in texts[0]
    assert "but rows is 10; plan with more" in texts[0]
    assert_like_one_process(case, outcomes)


def refused_then_right(rank: int, case: Case, kind: Kind) -> tuple[str, Outcome]:
    """Rank 1 passes a token less: the text, and a right step of the same layer afterwards."""
    with planner_of(kind, rank, case.sizes) as planner:
        moe: MoE = case.layer(rank, planner=planner)
        x_BlD = case.shards(rank)[0]
        text = refusal(lambda: moe(x_BlD[:, :-1] if rank == 1 else x_BlD, sharding=case.sharding))
        return text, run_moe(rank, case, moe)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mistake_of_one_rank_is_told_on_every_rank(rank_threads: RankThreads, kind: Kind) -> None:
    case = replace(CASES[12], seq=(3, 2, 0, 2))
    texts, outcomes = zip(*rank_threads.run(refused_then_right, case.ranks, case, kind), strict=True)
    assert len(set(texts)) == 1
    assert "x is (2, 1, 8) of torch.float64; its shard in order 'BL' is (2, 2, 8)" in texts[0]
    assert_like_one_process(case, outcomes)
