"""The balance loss over ranks against one process, and both against the formula of the paper."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding, sequence_balance_loss
from moe_dispatch.reference import reference_balance_loss
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.ranks import refusal, world

EXPERTS, TOP_K = 5, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How (B, L) is cut; one rank per piece."""

    batch: tuple[int, ...]
    seq: tuple[int, ...]
    held: tuple[tuple[int, ...], ...] | None = None
    order: Literal["BL", "LB"] = "BL"

    @property
    def ranks(self) -> int:
        return self.sharding.num_ranks

    @property
    def sharding(self) -> TokenSharding:
        batch, seq = Partition(self.batch), Partition(self.seq)
        return TokenSharding(batch=batch, seq=seq, held=self.held, order=self.order)

    def scores(self) -> Tensor:
        """Scores of the whole grid, in the case's order; they do not sum to 1, as sigmoid's do not."""
        generator = torch.Generator().manual_seed(sum(self.seq))
        return torch.rand(*self.sharding.global_shape, EXPERTS, generator=generator, dtype=torch.float64)


CUTS = [
    ((1,), (6,)),
    ((3,), (4,)),
    ((3,), (3, 2)),
    ((2,), (5, 0)),
    ((2, 1), (4,)),
    ((2,), (3, 0, 4)),
    ((3,), (1, 5, 1)),
    ((2, 0, 1), (3,)),
    ((3,), (3, 0, 1, 2)),
    ((2, 1), (3, 2)),
    ((3,), (0, 0, 7, 0)),
    ((2,), (1, 1, 1, 0)),
    ((2,), (3, 0, 1, 2) * 4),
    ((1, 0, 2, 1), (3, 0, 1, 2) * 4),
    ((2,), (*[0] * 40, 9, *[0] * 23)),
]
ORDERED = [((3,), (2, 1, 2, 1), ((0, 3), (1, 2))), ((1, 2), (2, 0, 1, 2), ((3, 1, 0), (), (2,)))]
CASES = [Case(batch=batch, seq=seq, order=order) for batch, seq in CUTS for order in ("BL", "LB")]
CASES += [
    Case(batch=batch, seq=seq, held=held, order=order) for batch, seq, held in ORDERED for order in ("BL", "LB")
]


def case_id(case: Case) -> str:
    return (
        f"{case.ranks} ranks {case.order} batch={case.batch}"
        + (f" seq={case.seq}" if len(case.seq) < 9 else "")
        + (f" held={case.held}" if case.held else "")
    )


def formula(scores_BLE: Tensor, top_k: int) -> tuple[float, list[list[list[float]]]]:
    """Loss and gradient, in Python floats: mean over sequences of sum_i f_i P_i, with
    f_i = E / (K L) * how often i is among a token's K best, and P_i = mean of s_i / sum_j s_j.
    """
    batch, length, num_experts = scores_BLE.shape
    loss, gradient = 0.0, []
    for sequence in scores_BLE.tolist():
        best = [sorted(scores)[-top_k:] for scores in sequence]
        f = [
            num_experts / (top_k * length) * sum(scores[i] in best[t] for t, scores in enumerate(sequence))
            for i in range(num_experts)
        ]
        share = [math.fsum(a * b for a, b in zip(f, scores, strict=True)) / sum(scores) for scores in sequence]
        loss += math.fsum(share) / length / batch
        gradient.append(
            [[(f_i - share[t]) / sum(scores) / length / batch for f_i in f] for t, scores in enumerate(sequence)]
        )
    return loss, gradient


def share_and_gradient(rank: int, case: Case) -> tuple[Tensor, Tensor]:
    """This rank's share, and the gradient of its scores."""
    scores_BlE = case.sharding.shard(case.scores(), rank).clone().requires_grad_()
    share = sequence_balance_loss(scores_BlE, top_k=TOP_K, sharding=case.sharding, group=world())
    share.backward()
    assert scores_BlE.grad is not None
    return share.detach(), scores_BlE.grad


@contextmanager
def noted_sums() -> Iterator[list[tuple[int, tuple[int, ...]]]]:
    """(rank, shape) of each all-reduce of ranks that are threads."""
    sums: list[tuple[int, tuple[int, ...]]] = []
    all_reduce = dist.all_reduce

    def noted(count: Tensor, **kwargs: Any) -> None:
        sums.append((dist.get_rank(), tuple(count.shape)))
        all_reduce(count, **kwargs)

    with mock.patch.object(dist, "all_reduce", noted):
        yield sums


def batch_first(whole: Tensor, case: Case) -> Tensor:
    return whole if case.order == "BL" else whole.transpose(0, 1)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_shares_sum_to_the_loss_of_one_process(case: Case, rank_threads: RankThreads) -> None:
    with noted_sums() as sums:
        shares, grads = zip(*rank_threads.run(share_and_gradient, case.ranks, case), strict=True)
    scores_BLE = batch_first(case.scores(), case).requires_grad_()
    reference = reference_balance_loss(scores_BLE, TOP_K)
    (reference_grad_BLE,) = torch.autograd.grad(reference, scores_BLE)
    assert torch.stack(shares).sum().item() == pytest.approx(reference.item(), rel=1e-12)
    grad_BLE = batch_first(case.sharding.unshard(grads), case)
    torch.testing.assert_close(grad_BLE, reference_grad_BLE, rtol=1e-12, atol=1e-12)
    loss, gradient = formula(scores_BLE, TOP_K)
    assert torch.stack(shares).sum().item() == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(grad_BLE, torch.tensor(gradient, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    of_each_rank = [(rank, (sum(case.batch), EXPERTS + 1)) for rank in range(case.ranks)]
    assert sorted(sums) == (of_each_rank if case.ranks > 1 else [])


@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
def test_the_reference_equals_the_formula(top_k: int) -> None:
    scores_BLE = CASES[2].scores().requires_grad_()
    loss, gradient = formula(scores_BLE, top_k)
    reference = reference_balance_loss(scores_BLE, top_k)
    reference.backward()
    assert reference.item() == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(scores_BLE.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_even_routing_costs_1_and_collapsed_routing_costs_the_experts() -> None:
    even_BLE = torch.eye(4).repeat(1, 3, 1)
    one_BLE = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(2, 5, 4)
    assert reference_balance_loss(even_BLE, 1).item() == pytest.approx(1.0)
    assert reference_balance_loss(one_BLE, 1).item() == pytest.approx(4.0)


def losses_without_tokens(rank: int, shape: tuple[int, int]) -> tuple[float, tuple[int, ...]]:
    sharding = TokenSharding(batch=shape[0], seq=Partition((shape[1], 0)))
    scores_BlE = torch.ones(*sharding.local_shape(rank), EXPERTS, requires_grad=True)
    share = sequence_balance_loss(scores_BlE, top_k=TOP_K, sharding=sharding, group=world())
    share.backward()
    assert scores_BlE.grad is not None
    return share.item(), tuple(scores_BlE.grad.shape)


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
def test_no_tokens_cost_nothing(shape: tuple[int, int], rank_threads: RankThreads) -> None:
    results = rank_threads.run(losses_without_tokens, 2, shape)
    assert results == [(0.0, (*shape, EXPERTS)), (0.0, (shape[0], 0, EXPERTS))]


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_no_tokens_cost_nothing_in_the_reference(shape: tuple[int, int]) -> None:
    assert reference_balance_loss(torch.ones(*shape, EXPERTS), TOP_K).item() == 0.0


# ---- refusals --------------------------------------------------------------------------------------


def refused(rank: int, ask: Callable[[int], Any]) -> str:
    return refusal(lambda: ask(rank))


def ask_with_a_selection(rank: int) -> None:
    sharding = TokenSharding(batch=2, seq=Partition((2, 1, 1))).select((0, 2))
    scores_BlE = torch.ones(*sharding.local_shape(rank), EXPERTS)
    sequence_balance_loss(scores_BlE, top_k=TOP_K, sharding=sharding, group=world())


def ask_with_another_shape(rank: int) -> None:
    sharding = TokenSharding(batch=2, seq=Partition((2, 1)))
    sequence_balance_loss(torch.ones(2, 3, EXPERTS), top_k=TOP_K, sharding=sharding, group=world())


def ask_with_another_group(rank: int) -> None:
    sharding = TokenSharding(batch=2, seq=Partition((2, 1, 1)))
    sequence_balance_loss(torch.ones(2, 2, EXPERTS), top_k=TOP_K, sharding=sharding, group=world())


def test_a_sharding_that_leaves_tokens_out_is_refused(rank_pool: RankPool) -> None:
    text = (
        "sequence_balance_loss needs every token of the grid, but the ranks of this sharding hold 6 of 8; describe "
        "the tokens that this group holds, not a selection of a larger mesh"
    )
    assert rank_pool.run(refused, 2, ask_with_a_selection) == [text] * 2


def test_scores_that_are_not_the_shard_are_refused(rank_pool: RankPool) -> None:
    texts = rank_pool.run(refused, 2, ask_with_another_shape)
    assert texts == [
        f"rank {rank} has a tensor of shape (2, 3, 5), but its shard in order 'BL' is {shape}; pass this rank's "
        f"tokens, as sharding.shard(x, {rank}) cuts them"
        for rank, shape in enumerate([(2, 2), (2, 1)])
    ]


def test_a_group_of_another_size_is_refused(rank_pool: RankPool) -> None:
    texts = rank_pool.run(refused, 2, ask_with_another_group)
    assert texts[0] == texts[1]
    assert texts[0].startswith("the token sharding describes 3 ranks, but the group has 2; they have to be equal")
