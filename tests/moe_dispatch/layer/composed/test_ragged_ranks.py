"""Data-parallel ranks whose batches have different shapes: each reshapes its tokens to one row, for any plan."""

import pytest

from moe_dispatch import gather_sharding
from moe_dispatch.testing import RankThreads
from tests.support.dispatch.moe import Case, Outcome, assert_like_one_process, outcome, pull
from tests.support.dispatch.plans import KINDS, Kind, planner_of
from tests.support.ranks import world

SHAPES = ((2, 5), (3, 1), (0, 4), (1, 2))  # (b, l) of each rank; one has no rows
CASE = Case(seq=tuple(rows * length for rows, length in SHAPES), batch=(1,), experts=(2, 0, 3, 1), top_k=3)


def run_ragged(rank: int, kind: Kind) -> Outcome:
    """The layer inside of a block that works on (b, l, D): what it gets and gives has that shape."""
    x_1tD, pull_1tD, pull_1tE = CASE.shards(rank)
    x_blD = x_1tD.detach().view(*SHAPES[rank], x_1tD.shape[2]).requires_grad_()
    sharding = gather_sharding(x_blD.shape[:2].numel(), device=x_blD.device, group=world())
    with planner_of(kind, rank, CASE.sizes) as planner:
        moe = CASE.layer(rank, planner=planner)
        y_1tD, scores_1tE = moe(x_blD.flatten(0, 1).unsqueeze(0), sharding=sharding)
        y_blD = y_1tD.view_as(x_blD)
        pull((y_blD, scores_1tE), pull_1tD.view_as(x_blD), pull_1tE).backward()
        moe.check()
    assert x_blD.grad is not None
    x_1tD.grad = x_blD.grad.view_as(x_1tD)
    return outcome(moe, x_1tD, (y_blD.view_as(y_1tD), scores_1tE))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_of_any_shape_equal_one_process(kind: Kind, rank_threads: RankThreads) -> None:
    outcomes = rank_threads.run(run_ragged, len(SHAPES), kind)
    assert_like_one_process(CASE, outcomes)
    assert [sum(one.load) for one in outcomes] == [3 * rows * length for rows, length in SHAPES]
