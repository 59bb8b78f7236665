"""A step in microbatches: gradients add up to those of one process over the whole step."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch.testing import RankThreads
from sp_attention import count_targets, mean_cross_entropy, mean_loss
from tests.support.attention.batches import NONE
from tests.support.ranks import refusal, world

VOCAB, WIDTH = 7, 5
# By microbatch, then rank. One has no target at all, rank 1 has none in the first two, and sizes differ.
STEP = [
    [[3, NONE, 4], [NONE, NONE], [1, 2, 3, 0]],
    [[NONE], [NONE, NONE, NONE], [NONE]],
    [[6], [], [NONE, 5]],
    [[NONE, 0], [2, 2, 2, 1, 0], []],
]
NUM_TARGETS = 14
RULE = "it has to be an int of at least 0, or a tensor () of one"


def inputs(microbatch: int, rank: int) -> tuple[Tensor, Tensor]:
    """(1, l, D) and (1, l), others for each microbatch and rank."""
    target_Bl = torch.tensor([STEP[microbatch][rank]], dtype=torch.int64).view(1, -1)
    draw = torch.Generator().manual_seed(10 * microbatch + rank)
    return torch.randn(1, target_Bl.shape[1], WIDTH, generator=draw, dtype=torch.float64), target_Bl


def weight() -> Tensor:
    return torch.randn(WIDTH, VOCAB, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def one_process(targets_of: Callable[[int, int], bool] = lambda microbatch, rank: True) -> tuple[float, Tensor]:
    """The mean over the step and the gradient of the weight, target by target."""
    weight_DV = weight().requires_grad_()
    terms = []
    for microbatch, ranks in enumerate(STEP):
        for rank in range(len(ranks)):
            x_BlD, target_Bl = inputs(microbatch, rank)
            for x_D, target in zip(x_BlD[0], target_Bl[0].tolist(), strict=True):
                if target != NONE and targets_of(microbatch, rank):
                    logits_V = x_D @ weight_DV
                    terms.append(logits_V.exp().sum().log() - logits_V[target])
    mean = torch.stack(terms).mean()
    (grad,) = torch.autograd.grad(mean, weight_DV)
    return mean.item(), grad


def cross_entropy(logits_BlV: Tensor, target_Bl: Tensor, num_targets: Any) -> Any:
    return mean_cross_entropy(logits_BlV, target_Bl, group=world(), num_targets=num_targets)


def of_losses(logits_BlV: Tensor, target_Bl: Tensor, num_targets: Any) -> Any:
    at_Bl = logits_BlV.gather(-1, target_Bl.clamp(min=0)[..., None])[..., 0]
    return mean_loss(logits_BlV.logsumexp(-1) - at_Bl, target_Bl, group=world(), num_targets=num_targets)


# ---- cases: what the ranks run -------------------------------------------------------------------------


def step(rank: int, mean: Callable[..., Any], as_tensor: bool) -> tuple[float, Tensor, set[int]]:
    """The whole step's mean, this rank's part of the gradient, and what was divided by."""
    microbatches = [inputs(microbatch, rank) for microbatch in range(len(STEP))]
    num_targets = count_targets([target_Bl for _, target_Bl in microbatches], group=world())
    weight_DV, whole, divisors = weight().requires_grad_(), torch.zeros((), dtype=torch.float64), set()
    for x_BlD, target_Bl in microbatches:
        loss = mean(x_BlD @ weight_DV, target_Bl, torch.tensor(num_targets) if as_tensor else num_targets)
        loss.share.backward()
        whole += loss.whole
        divisors.add(loss.num_targets)
    assert weight_DV.grad is not None
    return whole.item(), weight_DV.grad, divisors


def counted(rank: int) -> list[int]:
    """Counts of one tensor, of several, of none on rank 1, and with another index to ignore."""
    (_, first_Bl), (_, last_Bl) = inputs(0, rank), inputs(3, rank)
    return [
        count_targets(first_Bl, group=world()),
        count_targets((first_Bl, last_Bl.int()), group=world()),
        count_targets([] if rank == 1 else [last_Bl], group=world()),
        count_targets(last_Bl, group=world(), ignore_index=2),
    ]


def refused(rank: int, num_targets_of_rank: Mapping[int, Any]) -> str:
    num_targets = num_targets_of_rank.get(rank, 12)
    return refusal(lambda: mean_loss(torch.ones(4), torch.zeros(4).long(), group=world(), num_targets=num_targets))


def refused_count(rank: int, wrong: Any) -> str:
    return refusal(lambda: count_targets(wrong if rank == 2 else torch.zeros(4).long(), group=world()))


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("mean", [cross_entropy, of_losses])
def test_a_step_in_microbatches_is_that_of_one_process(
    mean: Callable[..., Any], as_tensor: bool, rank_threads: RankThreads
) -> None:
    wholes, grads, divisors = zip(*rank_threads.run(step, 3, mean, as_tensor), strict=True)
    wanted, wanted_grad = one_process()
    assert wholes == (pytest.approx(wanted, rel=1e-12),) * 3
    torch.testing.assert_close(torch.stack(grads).sum(0), wanted_grad, rtol=1e-12, atol=1e-13)
    assert divisors == ({NUM_TARGETS},) * 3


def test_means_of_microbatches_would_not_add_up() -> None:
    """So the test above can fail: a mean of the means is another number here."""
    mean_of_means = [one_process(lambda m, rank, at=at: m == at)[0] for at in (0, 2, 3)]
    assert sum(mean_of_means) / 3 != pytest.approx(one_process()[0], rel=1e-3)


def test_targets_are_counted_over_ranks_and_microbatches(rank_threads: RankThreads) -> None:
    assert rank_threads.run(counted, 3) == [[6, 6 + 6, 1, 2 + 2]] * 3


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (-1, "rank 1: num_targets is -1; " + RULE),
        (12.0, "rank 1: num_targets is 12.0; " + RULE),
        (True, "rank 1: num_targets is True; " + RULE),
        ("12", "rank 1: num_targets is '12'; " + RULE),
        (torch.tensor(12.0), "rank 1: num_targets is 12.0; " + RULE),
        (torch.tensor([12]), "rank 1: num_targets is (1,) of torch.int64; " + RULE),
        (torch.tensor(-3), "rank 1: num_targets is -3; " + RULE),
        (
            None,
            "the ranks disagree about one call (ranks [0, 2]: num_targets 12; rank [1]: num_targets left out); every "
            "rank of the group has to pass the same values",
        ),
        (
            13,
            "the ranks disagree about one call (ranks [0, 2]: num_targets 12; rank [1]: num_targets 13); every rank "
            "of the group has to pass the same values",
        ),
    ],
)
def test_another_denominator_on_one_rank_is_everyones_error(wrong: Any, text: str, rank_threads: RankThreads) -> None:
    assert rank_threads.run(refused, 3, {1: wrong}) == [text] * 3


def test_three_denominators_whose_mean_is_one_of_them_are_told_to_all(rank_threads: RankThreads) -> None:
    (text,) = set(rank_threads.run(refused, 3, {0: 12, 1: 13, 2: 14}))
    assert "rank [0]: num_targets 12; rank [1]: num_targets 13; rank [2]: num_targets 14" in text


def test_fewer_than_this_call_has_are_refused(rank_threads: RankThreads) -> None:
    text = (
        "num_targets is 11, but this call has 12 targets on all ranks; pass the number of all microbatches and all "
        "ranks, as count_targets gives it"
    )
    assert rank_threads.run(refused, 3, dict.fromkeys(range(3), 11)) == [text] * 3


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (torch.ones(4), "targets are torch.float32; they have to be ints"),
        ([torch.zeros(4).long(), torch.ones(4).bool()], "targets are torch.bool; they have to be ints"),
        ([[0, 1]], "targets are list; they have to be a tensor of ints"),
        (
            [torch.zeros(4).long(), torch.zeros(4, device="meta").long()],
            "targets are on meta, but what they are for on cpu; move them there",
        ),
    ],
)
def test_targets_that_cannot_be_counted_are_everyones_error(wrong: Any, text: str, rank_threads: RankThreads) -> None:
    assert rank_threads.run(refused_count, 3, wrong) == [f"rank 2: {text}"] * 3
