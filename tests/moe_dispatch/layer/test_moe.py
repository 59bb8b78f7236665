"""The MoE layer over ranks equals one process: outputs, every gradient, and what its experts see."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.moe import (
    CASES,
    DIM,
    TOLERANCE,
    Case,
    Outcome,
    assert_close,
    assert_equal_outcomes,
    assert_like_one_process,
    outcome,
    pull,
    run_layer,
)
from tests.support.orders import drawn_lists

pytestmark = pytest.mark.usefixtures("uncovered")


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    ranks = rng.randint(2, 4)
    groups = rng.choice((1, 2))
    marks = sorted(rng.randint(0, 4) for _ in range(ranks - 1))
    parts = [2 * (b - a) for a, b in itertools.pairwise([0, *marks, 4])]
    in_pieces = seed % 3 == 0
    seq = (*(rng.choice((0, 1, 2, 4)) for _ in range(ranks + in_pieces)), 1)[1 - in_pieces :]
    return Case(
        seq=seq,
        held=drawn_lists(len(seq), ranks, rng) if in_pieces else None,
        batch=(rng.randint(1, 3),),
        experts=tuple(parts),
        order=rng.choice(("BL", "LB")),
        top_k=rng.randint(1, 4),
        score=rng.choice(("softmax", "sigmoid")),
        groups=groups,
        normalize=rng.random() < 0.5,
        shared=rng.random() < 0.5,
        seed=seed,
    )


@pytest.mark.parametrize("case", CASES + [random_case(seed) for seed in range(12)], ids=str)
def test_ranks_equal_one_process(case: Case, rank_threads: RankThreads) -> None:
    assert_like_one_process(case, rank_threads.run(run_layer, case.ranks, case))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(100, 300))
def test_ranks_equal_one_process_in_many_cases(seed: int, rank_threads: RankThreads) -> None:
    case = random_case(seed)
    assert_like_one_process(case, rank_threads.run(run_layer, case.ranks, case))


@pytest.mark.parametrize("case", [CASES[3], CASES[9], CASES[12]], ids=str)
def test_ranks_equal_one_process_in_float32(case: Case, rank_pool: RankPool) -> None:
    case = replace(case, dtype=torch.float32)
    assert_like_one_process(case, rank_pool.run(run_layer, case.ranks, case))


def test_the_reference_equals_a_dense_sum_over_all_experts() -> None:
    case = Case(seq=(5,), experts=(6,), top_k=3)
    router, experts, shared = case.parts()
    assert shared is not None
    x_BLD = case.inputs()[0]
    scores_BLE = (x_BLD @ router.weight_ED.T).sigmoid()
    chosen_BLE = torch.zeros_like(scores_BLE).scatter(-1, (scores_BLE + router.expert_bias_E).topk(3).indices, 1.0)
    weight_BLE = 2.5 * chosen_BLE * scores_BLE / (chosen_BLE * scores_BLE).sum(-1, keepdim=True)
    gate_BLEF, up_BLEF = (
        torch.einsum("bld,edf->blef", x_BLD, matrix) for matrix in (experts.gate_eDF, experts.up_eDF)
    )
    hidden_BLEF = gate_BLEF * gate_BLEF.sigmoid() * up_BLEF
    y_BLD = torch.einsum("ble,blef,efd->bld", weight_BLE, hidden_BLEF, experts.down_eFD) + shared(x_BLD)
    got_BLD, got_scores_BLE = case.reference()(x_BLD)
    assert_close(got_BLD, y_BLD, 1e-12, "y")
    assert_close(got_scores_BLE, scores_BLE, 1e-12, "scores")


def nothing_to_do(rank: int, seq: tuple[int, ...]) -> tuple[Outcome, float]:
    """A whole batch without tokens, then a sum that every rank has to reach."""
    found = run_layer(rank, Case(seq=seq, experts=(2, 3)))
    total = torch.ones(())
    dist.all_reduce(total)
    return found, total.item()


@pytest.mark.parametrize("seq", [(0, 0), (0, 3)])
def test_a_rank_without_tokens_takes_part_and_has_zero_gradients(seq: tuple[int, int], rank_pool: RankPool) -> None:
    outcomes, totals = zip(*rank_pool.run(nothing_to_do, 2, seq), strict=True)
    assert totals == (2.0, 2.0)
    assert outcomes[0].y_BlD.shape == outcomes[0].dx_BlD.shape == (2, 0, DIM)
    for name, gradient in outcomes[0].gradients.items():
        if not name.startswith("experts."):
            assert gradient.count_nonzero() == 0, name
    served = outcomes[0].gradients["experts.gate_eDF"]
    assert (served.count_nonzero() > 0) == (sum(seq) > 0)


def test_the_reference_takes_a_batch_without_tokens() -> None:
    case = Case(seq=(0,), experts=(3,))
    y_BLD, scores_BLE = case.reference()(torch.zeros(2, 0, DIM, dtype=torch.float64))
    assert y_BLD.shape == (2, 0, DIM)
    assert scores_BLE.shape == (2, 0, 3)


def run_strided(rank: int, case: Case) -> tuple[Outcome, Outcome]:
    """The same tokens contiguous, and as every other column of a transposed tensor."""
    moe, (x_BlD, pull_BlD, pull_BlE) = case.layer(rank), case.shards(rank)
    wide_DlB2 = torch.stack([x_BlD.detach(), torch.full_like(x_BlD, torch.nan)], dim=-1).permute(2, 1, 0, 3)
    strided_BlD = wide_DlB2.contiguous()[..., 0].permute(2, 1, 0).requires_grad_()
    results = moe(strided_BlD, sharding=case.sharding)
    pull(results, pull_BlD, pull_BlE).backward()
    return run_layer(rank, case), outcome(moe, strided_BlD, results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokens_may_be_strided(dtype: torch.dtype, rank_threads: RankThreads) -> None:
    case = Case(seq=(3, 2), experts=(2, 3), dtype=dtype)
    for plain, strided in rank_threads.run(run_strided, 2, case):
        assert_equal_outcomes(strided, plain, TOLERANCE[dtype])


def rows_of_experts(rank: int, case: Case) -> Tensor:
    """What this rank's experts were given."""
    moe, seen = case.layer(rank), []
    moe.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    moe(case.shards(rank)[0], sharding=case.sharding)
    return seen[0]


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[9], CASES[13]], ids=str)
def test_experts_see_their_rows_in_global_token_order(case: Case, rank_threads: RankThreads) -> None:
    router, x_TD = case.parts()[0], case.inputs()[0].flatten(0, 1)
    expert_TK = router.choose(router(x_TD))
    want = [x_TD[(expert_TK == expert).any(1)] for expert in range(case.partition.total)]
    assert torch.equal(torch.cat(rank_threads.run(rows_of_experts, case.ranks, case)), torch.cat(want))


def same_expert_for_all(rank: int, expert: int) -> list[Tensor | None]:
    """Every choice of every token on one expert: most ranks get no row. Then y.sum(), whose gradient is expanded."""
    case = Case(seq=(3, 2), experts=(2, 2), dtype=torch.float32, shared=False)
    moe, (x_BlD, _, _) = case.layer(rank), case.shards(rank)
    moe.router.choose = lambda scores_BlE: torch.full((*scores_BlE.shape[:2], 2), expert)
    moe(x_BlD, sharding=case.sharding)[0].sum().backward()
    return [parameter.grad for parameter in moe.experts.parameters()]


def test_all_rows_on_one_expert_leave_zero_gradients_on_the_others(rank_threads: RankThreads) -> None:
    for rank, grads in enumerate(rank_threads.run(same_expert_for_all, 2, 3)):
        for grad_eDF in grads:
            assert grad_eDF is not None
            assert [bool(grad.count_nonzero()) for grad in grad_eDF] == [False, rank == 1]


def no_expert_for_some(rank: int) -> tuple[Tensor, Tensor, list[int]]:
    """A router that gives token 0 of every rank no expert at all, and the others one instead of two."""
    case = Case(seq=(3, 2), experts=(2, 2), shared=False, normalize=False)
    moe, (x_BlD, _, _) = case.layer(rank), case.shards(rank)
    choose = moe.router.choose

    def choose_less(scores_BlE: Tensor) -> Tensor:
        expert_BlK = choose(scores_BlE)
        expert_BlK[..., 1] = -1
        expert_BlK[0, 0] = -1
        return expert_BlK

    moe.router.choose = choose_less
    y_BlD, _ = moe(x_BlD, sharding=case.sharding)
    y_BlD.sum().backward()
    assert x_BlD.grad is not None
    return y_BlD.detach(), x_BlD.grad, moe.load_E.tolist()


def test_a_router_may_name_no_expert(rank_threads: RankThreads) -> None:
    for (y_BlD, dx_BlD, load), tokens in zip(rank_threads.run(no_expert_for_some, 2), (6, 4), strict=True):
        assert y_BlD[0, 0].count_nonzero() == dx_BlD[0, 0].count_nonzero() == 0
        assert all(y_D.count_nonzero() for y_D in y_BlD.flatten(0, 1)[1:])
        assert sum(load) == tokens - 1
