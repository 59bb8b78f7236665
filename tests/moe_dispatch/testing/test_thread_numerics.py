"""An MoE layer on ranks that are threads: what it computes on processes, at sizes that processes do not reach."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dispatch import Partition, TokenSharding, combine, dispatch, plan_dispatch
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.moe import (
    Case,
    Outcome,
    assert_equal_outcomes,
    assert_like_one_process,
    outcome,
    pull,
    run_layer,
)
from tests.support.ranks import world

FOUR = Case(seq=(3, 0, 4, 2), experts=(2, 3, 0, 1), top_k=3)


def recompute_layer(rank: int, case: Case, use_reentrant: bool) -> Outcome:
    """``run_layer`` with a forward that backward repeats, collectives and random numbers included."""
    moe, (x_BlD, pull_BlD, pull_BlE) = case.layer(rank), case.shards(rank)
    drawn: list[float] = []

    def forward(x_BlD: Tensor) -> tuple[Tensor, Tensor]:
        drawn.append(torch.rand(()).item())
        return moe(x_BlD, sharding=case.sharding)

    results = checkpoint(forward, x_BlD, use_reentrant=use_reentrant)
    assert isinstance(results, tuple)
    torch.rand(1 + rank)  # ranks part here, and each one's backward draws again what its forward drew
    pull(results, pull_BlD, pull_BlE).backward()
    assert drawn[0] == drawn[1]
    return outcome(moe, x_BlD, results)


def test_four_threads_compute_what_four_processes_compute(rank_pool: RankPool, rank_threads: RankThreads) -> None:
    ours, theirs = rank_threads.run(run_layer, 4, FOUR), rank_pool.run(run_layer, 4, FOUR)
    for got, want in zip(ours, theirs, strict=True):
        assert_equal_outcomes(got, want, 0.0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_repeats_its_collectives_in_backward(rank_threads: RankThreads, use_reentrant: bool) -> None:
    assert_like_one_process(FOUR, rank_threads.run(recompute_layer, 4, FOUR, use_reentrant))


def test_sixteen_ranks_compute_what_one_process_computes(rank_threads: RankThreads) -> None:
    case = Case(seq=(1, 0, 2, 3) * 4, experts=(1, 2, 0, 1) * 4, top_k=3)
    assert_like_one_process(case, rank_threads.run(run_layer, 16, case))


def weigh_and_return(rank: int, sharding: TokenSharding, x_BLD: Tensor, id_BLK: Tensor, w_BLK: Tensor) -> Tensor:
    """Experts that multiply by their number plus one."""
    experts = Partition((2,) * sharding.num_ranks)
    x_BlD, id_BlK, w_BlK = (sharding.shard(whole, rank).clone() for whole in (x_BLD, id_BLK, w_BLK))
    plan = plan_dispatch(id_BlK, dim=x_BlD.shape[-1], sharding=sharding, experts=experts, group=world())
    x_MD, w_M = dispatch(x_BlD, w_BlK, plan)
    first = 2 * rank + 1
    scale_M = torch.repeat_interleave(torch.tensor([first, first + 1.0]), plan.rows_per_expert_e.cpu())
    return combine(x_MD * (scale_M * w_M).unsqueeze(1), plan)


def test_sixty_four_ranks_dispatch_and_combine(rank_threads: RankThreads) -> None:
    sharding = TokenSharding(batch=2, seq=Partition((1, 0, 2, 1) * 16))
    x_BLD, w_BLK = torch.randn(2, 64, 4), torch.rand(2, 64, 3)
    id_BLK = torch.randint(128, (2, 64, 3))
    y_BLD = sharding.unshard(rank_threads.run(weigh_and_return, 64, sharding, x_BLD, id_BLK, w_BLK))
    torch.testing.assert_close(y_BLD, x_BLD * (w_BLK * (id_BLK + 1)).sum(-1, keepdim=True))
