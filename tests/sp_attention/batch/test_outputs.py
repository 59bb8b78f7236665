"""gather_outputs: batch first, 0 at padding, and its gradient."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_dispatch import TokenSharding
from moe_dispatch.testing import RankPool, RankThreads
from moe_dispatch.testing.counting import counting
from sp_attention import Batch, gather_outputs, shard_batch
from tests.support.attention.batches import GOOD, ORDERS, Order, sharding_of, tokens, whole_of
from tests.support.ranks import refusal, world

OUTPUTS: dict[str, tuple[Callable[[Tensor], object], str, str]] = {
    "of all tokens": (
        lambda x_BlD: torch.zeros(2, 5, 3),
        "rank 1: the output is (2, 5, 3), but this rank's tokens in order 'BL' are (2, 3); pass what was computed "
        "for them",
        "",
    ),
    "a token short": (lambda x_BlD: x_BlD[:, 1:], "rank 1: the output is (2, 2, 3), but this rank's tokens", ""),
    "of another order": (lambda x_BlD: x_BlD.transpose(0, 1), "rank 1: the output is (3, 2, 3), but this rank's", ""),
    "no tensor": (lambda x_BlD: x_BlD.tolist(), "rank 1: the output is list, but this rank's tokens", ""),
    "of another width": (
        lambda x_BlD: x_BlD[..., 1:],
        "outputs (3,) of torch.float32",
        "outputs (2,) of torch.float32",
    ),
    "of another dtype": (
        lambda x_BlD: x_BlD.double(),
        "outputs (3,) of torch.float32",
        "outputs (3,) of torch.float64",
    ),
    "with a gradient": (
        lambda x_BlD: x_BlD.requires_grad_(),
        "outputs (3,) of torch.float32 without gradient",
        "outputs (3,) of torch.float32 with gradient",
    ),
}


# ---- cases: what the ranks run -------------------------------------------------------------------------


def gathered(rank: int, batch: Batch, sharding: TokenSharding) -> tuple[Tensor, Tensor]:
    """The whole of an output that is NaN at padding, and this rank's gradient of a weighted sum of it."""
    part = shard_batch(batch, sharding=sharding, group=world())
    x_BlD = part.token_Bl[..., None] + torch.tensor([0.0, 0.5])
    x_BlD = x_BlD.masked_fill(~part.real_Bl[..., None], math.nan).requires_grad_()
    x_BLD = gather_outputs(x_BlD, batch=part, group=world())
    weight_BLD = batch.token_BL[..., None] * torch.tensor([1.0, 2.0]) * (rank + 1)
    x_BLD.backward(weight_BLD)
    assert x_BlD.grad is not None
    return x_BLD.detach(), x_BlD.grad


def gather_wrong(rank: int, name: str) -> tuple[str, bool]:
    """What is told where the output of rank 1 is wrong, and whether the group works afterwards."""
    part = shard_batch(GOOD, sharding=sharding_of(2, (2, 3)), group=world())
    x_BlD = torch.ones(*part.token_Bl.shape, 3)
    wrong_BlD = OUTPUTS[name][0](x_BlD.clone()) if rank == 1 else x_BlD
    text = refusal(lambda: gather_outputs(wrong_BlD, batch=part, group=world()))  # type: ignore[arg-type]
    return text, bool(gather_outputs(x_BlD, batch=part, group=world()).all())


def gathering(rank: int) -> tuple[list[str], list[str]]:
    part = shard_batch(GOOD, sharding=sharding_of(2, (2, 3)), group=world())
    x_BlD = torch.ones(*part.token_Bl.shape, 3, requires_grad=True)
    with counting() as forward:
        x_BLD = gather_outputs(x_BlD, batch=part, group=world())
    with counting() as backward:
        x_BLD.sum().backward()
    return forward.collectives, backward.collectives


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_outputs_come_back_batch_first_and_0_at_padding(order: Order, rank_threads: RankThreads) -> None:
    """B11: also where the sequence is the first dimension."""
    token_BL = tokens(2, 6)
    real_BL = token_BL % 4 > 0
    sharding = sharding_of(2, (2, 0, 4), order)
    wholes, grads = zip(
        *rank_threads.run(gathered, 3, Batch(token_BL=token_BL, attention_mask=real_BL), sharding), strict=True
    )
    wanted_BLD = torch.where(real_BL[..., None], token_BL[..., None] + torch.tensor([0.0, 0.5]), 0.0)
    for whole_BLD in wholes:
        assert torch.equal(whole_BLD, wanted_BLD)
    grad_2BL = whole_of([grad.movedim(-1, 0) for grad in grads], sharding)
    wanted_2BL = torch.stack([6.0 * token_BL, 12.0 * token_BL]).masked_fill(~real_BL, 0.0)
    assert torch.equal(grad_2BL, wanted_2BL)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_wrong_output_of_one_rank_is_everyones_error(name: str, rank_pool: RankPool) -> None:
    (text, usable), other = rank_pool.run(gather_wrong, 2, name)
    assert other == (text, usable)
    assert usable
    assert all(words in text for words in OUTPUTS[name][1:])


def test_gathering_takes_a_word_and_the_rows(rank_pool: RankPool) -> None:
    one = "c10d::alltoall_base_"
    assert rank_pool.run(gathering, 2) == [([one, one], [one])] * 2
