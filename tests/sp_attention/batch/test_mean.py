"""The mean loss over all ranks is that of one process."""

import math
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch.testing import RankPool
from sp_attention import mean_cross_entropy, mean_loss
from sp_attention.batch.loss import _mean
from tests.support.attention.batches import NONE
from tests.support.ranks import world

VOCAB, WIDTH, HEADS, GROUPS = 11, 12, 3, 1
TARGETS = {
    "unequal": [[3, NONE, 4], [NONE, NONE, 2], [1, 2, 3]],
    "one rank has none": [[3, 1, 4], [NONE, NONE, NONE], [1, NONE, 3]],
    "one target in all": [[NONE, NONE, NONE], [NONE, 0, NONE], [NONE, NONE, NONE]],
    "none at all": [[NONE] * 3] * 3,
    "one rank is empty": [[3, NONE, 4], [], [1, 2, 3]],
    "all ranks are empty": [[], [], []],
}


def logits_of(targets: list[list[int]], rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(1, l, V) of one rank, another for each; NaN where there is no target."""
    draw = torch.Generator().manual_seed(rank)
    logits_BlV = torch.randn(1, len(targets[rank]), VOCAB, generator=draw, dtype=torch.float64).to(dtype)
    return logits_BlV.masked_fill((torch.tensor([targets[rank]]).view(1, -1) == NONE)[..., None], math.nan)


def losses(logits_BlV: Tensor, target_Bl: Tensor) -> Tensor:
    """Per token; NaN where there is no target."""
    at_Bl = logits_BlV.gather(-1, target_Bl.clamp(min=0)[..., None])[..., 0]
    return logits_BlV.logsumexp(-1) - at_Bl


def one_process(targets: list[list[int]], dtype: torch.dtype = torch.float64) -> tuple[float, list[Tensor]]:
    """The mean over targets, one by one, and the gradient of each rank's logits."""
    logits = [logits_of(targets, rank, dtype).double().requires_grad_() for rank in range(len(targets))]
    terms = [
        logits[rank][0, i].logsumexp(0) - logits[rank][0, i, target]
        for rank, row in enumerate(targets)
        for i, target in enumerate(row)
        if target != NONE
    ]
    mean = torch.stack(terms).mean() if terms else sum((x.sum() * 0 for x in logits), start=torch.zeros(()))
    grads = torch.autograd.grad(mean, logits, allow_unused=True, materialize_grads=True)
    return float(mean.detach().nan_to_num()), [grad.nan_to_num(0.0) for grad in grads]


@dataclass(frozen=True, slots=True)
class Answer:
    share: Tensor
    whole: Tensor
    num_targets: int
    grad: Tensor
    collectives: list[tuple[int, ...]]


# ---- cases: what the ranks run -------------------------------------------------------------------------


def answer(rank: int, targets: list[list[int]], of_logits: bool, dtype: torch.dtype) -> Answer:
    logits_BlV = logits_of(targets, rank, dtype).requires_grad_()
    target_Bl = torch.tensor([targets[rank]], dtype=torch.int64).view(1, -1)
    collectives: list[tuple[int, ...]] = []
    all_reduce = dist.all_reduce

    def counted(x: Tensor, **kwargs: Any) -> None:
        collectives.append(tuple(x.shape))
        all_reduce(x, **kwargs)

    with mock.patch.object(dist, "all_reduce", counted):
        if of_logits:
            mean = mean_cross_entropy(logits_BlV, target_Bl, group=world())
        else:
            mean = mean_loss(losses(logits_BlV, target_Bl), target_Bl, group=world())
        mean.share.backward()
    assert not mean.whole.requires_grad
    assert logits_BlV.grad is not None  # a rank without targets keeps its graph
    return Answer(mean.share.detach(), mean.whole, mean.num_targets, logits_BlV.grad, collectives)


def sum_of_many(rank: int) -> Tensor:
    """The losses of one rank in bfloat16, where 601 is 600."""
    loss_Bl = torch.ones(1, 601, dtype=torch.bfloat16)
    return mean_loss(loss_Bl, torch.zeros(1, 601, dtype=torch.int64), group=world()).share


def count_many(rank: int) -> tuple[int, float]:
    mean = _mean(torch.tensor(2.0**24), 2**24 * rank + 1, "", world(), None)
    return mean.num_targets, mean.share.item()


def no_graph(rank: int) -> tuple[bool, float]:
    mean = mean_cross_entropy(torch.zeros(2, 3, VOCAB), torch.zeros(2, 3, dtype=torch.int32), group=world())
    return mean.share.requires_grad, mean.whole.item()


def ignored(rank: int) -> tuple[float, list[float], list[float]]:
    """The mean, and the gradients of a loss that is NaN where it is ignored and of what that came from."""
    x_Bl = torch.tensor([[4.0, 0.0]], requires_grad=True)
    loss_Bl = 0 * x_Bl.rsqrt() + x_Bl  # infinity times 0
    loss_Bl.retain_grad()
    mean = mean_loss(loss_Bl, torch.tensor([[1, NONE]]), group=world())
    mean.share.backward()
    assert loss_Bl.grad is not None
    assert x_Bl.grad is not None
    assert loss_Bl.isnan().tolist() == [[False, True]]
    return mean.whole.item(), loss_Bl.grad.flatten().tolist(), x_Bl.grad.flatten().tolist()


def another_index(rank: int) -> int:
    return mean_loss(torch.ones(4), torch.tensor([-1, NONE, 2, -1]), group=world(), ignore_index=-1).num_targets


# ---- what the tests ask --------------------------------------------------------------------------------


def check(answers: list[Answer], targets: list[list[int]]) -> None:
    mean, _ = one_process(targets)
    assert sum(got.share.item() for got in answers) == pytest.approx(mean, rel=1e-12, abs=1e-15)
    for got in answers:
        assert got.whole.item() == pytest.approx(mean, rel=1e-12, abs=1e-15)
        assert got.num_targets == sum(target != NONE for row in targets for target in row)
        assert got.collectives == [(5,)]  # one, and none in backward
    assert len({got.whole.item() for got in answers}) == 1


@pytest.mark.parametrize("name", TARGETS)
def test_cross_entropy_is_that_of_one_process(name: str, rank_pool: RankPool) -> None:  # B21
    answers = rank_pool.run(answer, 3, TARGETS[name], True, torch.float64)
    check(answers, TARGETS[name])
    for got, grad in zip(answers, one_process(TARGETS[name])[1], strict=True):
        torch.testing.assert_close(got.grad, grad, rtol=1e-12, atol=1e-14)  # not NaN where there is no target


@pytest.mark.parametrize("name", TARGETS)
def test_a_mean_of_losses_is_that_of_one_process(name: str, rank_pool: RankPool) -> None:
    answers = rank_pool.run(answer, 3, TARGETS[name], False, torch.float64)
    check(answers, TARGETS[name])
    for rank, (got, grad) in enumerate(zip(answers, one_process(TARGETS[name])[1], strict=True)):
        counts_l = torch.tensor(TARGETS[name][rank]) != NONE
        torch.testing.assert_close(got.grad[:, counts_l], grad[:, counts_l], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_taken_in_float32(dtype: torch.dtype, rank_pool: RankPool) -> None:
    mean, grads = one_process(TARGETS["unequal"], dtype)
    for got, grad in zip(rank_pool.run(answer, 3, TARGETS["unequal"], True, dtype), grads, strict=True):
        assert got.whole.dtype == got.share.dtype == torch.float32
        assert got.grad.dtype == dtype
        assert got.whole.item() == pytest.approx(mean, rel=1e-6)
        torch.testing.assert_close(got.grad, grad.to(dtype))


def test_a_sum_of_bfloat16_losses_is_exact(rank_pool: RankPool) -> None:
    for share in rank_pool.run(sum_of_many, 2):
        assert share.dtype == torch.float32
        assert share.item() == 0.5


def test_counts_are_exact_where_float32_is_not(rank_pool: RankPool) -> None:
    assert rank_pool.run(count_many, 2) == [(2**24 + 2, pytest.approx(2**24 / (2**24 + 2), rel=1e-7))] * 2
    assert torch.tensor(2.0**24) + 1 == 2.0**24


def test_evaluation_needs_no_graph_and_one_rank_is_enough(rank_pool: RankPool) -> None:
    assert rank_pool.run(no_graph, 1) == [(False, pytest.approx(math.log(VOCAB)))]


def test_nan_where_there_is_no_target_has_gradient_0_and_that_goes_into_its_graph(rank_pool: RankPool) -> None:
    """As ``mean_loss`` says: it cannot know what made the losses."""
    for whole, of_loss, of_x in rank_pool.run(ignored, 2):
        assert (whole, of_loss) == (4.0, [0.5, 0.0])
        assert of_x[0] == 0.5
        assert math.isnan(of_x[1])


def test_the_index_to_ignore_is_the_callers(rank_pool: RankPool) -> None:
    assert rank_pool.run(another_index, 2) == [4, 4]
