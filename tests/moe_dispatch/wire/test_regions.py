"""Between a shard and the whole: every token in its own place, and its gradient back."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding, gather_tokens, place_tokens
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.ranks import refusal, world


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How (B, L, *trailing) is cut; one rank per piece."""

    batch: tuple[int, ...]
    seq: tuple[int, ...]
    order: Literal["BL", "LB"] = "BL"
    trailing: tuple[int, ...] = (3,)

    @property
    def ranks(self) -> int:
        return len(self.batch) * len(self.seq)

    @property
    def sharding(self) -> TokenSharding:
        return TokenSharding(batch=Partition(self.batch), seq=Partition(self.seq), order=self.order)

    def whole(self, start: int = 1) -> Tensor:
        """Integers, each once, so that a misplaced token names itself and sums are exact."""
        shape = (*self.sharding.global_shape, *self.trailing)
        count = torch.Size(shape).numel()
        return torch.arange(start, start + count, dtype=torch.float64).view(shape)

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        """Slices in plain Python, without the sharding."""
        i, j = divmod(rank, len(self.seq))
        b, l = sum(self.batch[:i]), sum(self.seq[:j])  # noqa: E741
        rows, positions = slice(b, b + self.batch[i]), slice(l, l + self.seq[j])
        return whole[rows, positions] if self.order == "BL" else whole[positions, rows]


CUTS = [
    ((2,), (3,)),
    ((2,), (2, 1)),
    ((3,), (0, 4)),
    ((2, 1), (3,)),
    ((2,), (3, 0, 2)),
    ((3,), (0, 7, 0)),
    ((2,), (3, 0, 1, 2)),
    ((2, 1), (3, 2)),
    ((2,), (1, 1, 0, 0)),
    ((2,), (0, 0)),
]
CASES = [
    Case(batch=batch, seq=seq, order=order, trailing=trailing)
    for batch, seq in CUTS
    for order in ("BL", "LB")
    for trailing in ((), (3,), (2, 3))
]
MANY = [
    Case(batch=batch, seq=seq, order=order)
    for order in ("BL", "LB")
    for batch, seq in (
        ((2,), (3, 0, 1, 2) * 4),  # 16 ranks
        ((1, 0, 2, 1), (3, 0, 1, 2) * 4),  # 64 ranks, as below
        ((2,), (*[0] * 40, 9, *[0] * 23)),
    )
]


def case_id(case: Case) -> str:
    return f"{case.ranks} ranks of {sum(case.seq)}" if case in MANY else str(case)


@pytest.mark.parametrize("case", CASES + MANY, ids=case_id)
def test_placed_tokens_sum_to_the_whole(case: Case) -> None:
    x_BLD, pull_BLD = case.whole(), case.whole(start=1000)
    sum_BLD = torch.zeros_like(x_BLD)
    for rank in range(case.ranks):
        x_BlD = case.cut(x_BLD, rank).clone().requires_grad_()
        placed_BLD = place_tokens(x_BlD, sharding=case.sharding, rank=rank)
        assert torch.equal(case.cut(placed_BLD, rank), x_BlD)
        assert placed_BLD.count_nonzero() == x_BlD.numel()
        (placed_BLD * pull_BLD).sum().backward()
        assert x_BlD.grad is not None
        assert torch.equal(x_BlD.grad, case.cut(pull_BLD, rank))
        sum_BLD += placed_BLD.detach()
    assert torch.equal(sum_BLD, x_BLD)


def gathered(rank: int, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, bool]:
    """The whole, the gradient when rank r pulls r + 1 times, and whether a strided input gives the same."""
    x_BlD = case.cut(case.whole(), rank).to(dtype).clone().requires_grad_()
    x_BLD = gather_tokens(x_BlD, sharding=case.sharding, group=world())
    (x_BLD * case.whole(start=10).to(dtype) * (rank + 1)).sum().backward()
    assert x_BlD.grad is not None
    strided_BlD = torch.stack([x_BlD.detach(), torch.full_like(x_BlD, torch.nan)], dim=-1).select(-1, 0)
    again_BLD = gather_tokens(strided_BlD, sharding=case.sharding, group=world())
    return x_BLD.detach(), x_BlD.grad, torch.equal(again_BLD, x_BLD)


@pytest.mark.parametrize("case", CASES + MANY, ids=case_id)
def test_gathered_tokens_are_the_whole_and_gradients_are_summed(case: Case, rank_threads: RankThreads) -> None:
    times = case.ranks * (case.ranks + 1) // 2
    for rank, (x_BLD, grad_BlD, strided) in enumerate(rank_threads.run(gathered, case.ranks, case, torch.float64)):
        assert torch.equal(x_BLD, case.whole())
        assert torch.equal(grad_BlD, times * case.cut(case.whole(start=10), rank))
        assert strided


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", ["BL", "LB"])
def test_gathered_tokens_keep_their_dtype(
    dtype: torch.dtype, order: Literal["BL", "LB"], rank_threads: RankThreads
) -> None:
    case = Case(batch=(2,), seq=(3, 0, 2), order=order, trailing=(2,))  # integers up to 256 are exact in bfloat16
    for rank, (x_BLD, grad_BlD, _) in enumerate(rank_threads.run(gathered, 3, case, dtype)):
        assert x_BLD.dtype == grad_BlD.dtype == dtype
        assert torch.equal(x_BLD, case.whole().to(dtype))
        assert torch.equal(grad_BlD, (6 * case.cut(case.whole(start=10), rank)).to(dtype))


def collectives_of_gather(rank: int) -> list[str]:
    calls: list[str] = []
    all_to_all_single = dist.all_to_all_single

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("exchange")
        return all_to_all_single(*args, **kwargs)

    case = Case(batch=(2,), seq=(0, 3))
    x_BlD = case.cut(case.whole(), rank).clone().requires_grad_()
    dist.all_to_all_single = counted
    try:
        x_BLD = gather_tokens(x_BlD, sharding=case.sharding, group=world())
        calls.append("backward")
        x_BLD.sum().backward()
    finally:
        dist.all_to_all_single = all_to_all_single
    return calls


def test_one_collective_each_way_also_without_tokens(rank_pool: RankPool) -> None:
    assert rank_pool.run(collectives_of_gather, 2) == [["exchange", "backward", "exchange"]] * 2


def test_the_last_token_of_an_uneven_batch_keeps_its_place() -> None:
    """B = 2, L = 3 on two shards of 2 and 1 positions: rank 1 holds tokens 2 and 5.

    A formula with shards padded to l = 2, (i // l) * (l * ranks) + rank * l + i % l, sends its second token to
    slot 3, which a padded row of 4 then drops.
    """
    sharding = TokenSharding(batch=2, seq=Partition((2, 1)))
    padded_length, ranks, rank, local_token = 2, 2, 1, 1
    row, position = local_token // padded_length, local_token % padded_length
    assert row * (padded_length * ranks) + rank * padded_length + position == 3
    assert sharding.global_token(local_token, rank) == 5
    token_BL = torch.tensor([[0, 1, 2], [3, 4, 5]]) + 100
    placed_BL = place_tokens(token_BL[:, 2:], sharding=sharding, rank=1)
    assert placed_BL.tolist() == [[0, 0, 102], [0, 0, 105]]
    assert place_tokens(token_BL[:, :2], sharding=sharding, rank=0).tolist() == [[100, 101, 0], [103, 104, 0]]


def test_a_selection_places_tokens_on_the_whole_grid() -> None:
    sharding = TokenSharding(batch=2, seq=Partition((1, 2, 1))).select((2, 0))
    x_BlD = torch.tensor([[[7.0]], [[8.0]]])
    assert place_tokens(x_BlD, sharding=sharding, rank=0).squeeze(-1).tolist() == [[0, 0, 0, 7], [0, 0, 0, 8]]
    assert place_tokens(x_BlD, sharding=sharding, rank=1).squeeze(-1).tolist() == [[7, 0, 0, 0], [8, 0, 0, 0]]


# ---- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "rank"), [((2, 2, 5), 1), ((1, 2, 5), 1), ((2, 1), 0)])
def test_a_shape_that_is_not_the_shard_is_refused(shape: tuple[int, ...], rank: int) -> None:
    sharding = TokenSharding(batch=2, seq=Partition((2, 1)))
    text = (
        f"rank {rank} has a tensor of shape {shape}, but its shard in order 'BL' is {sharding.local_shape(rank)}; "
        f"pass this rank's tokens, as sharding.shard(x, {rank}) cuts them"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        place_tokens(torch.ones(shape), sharding=sharding, rank=rank)


def refused(rank: int, ask: Callable[[int], Any]) -> str:
    return refusal(lambda: ask(rank))


def gather_a_selection(rank: int) -> None:
    sharding = TokenSharding(batch=2, seq=Partition((2, 1, 1))).select((0, 2))
    gather_tokens(torch.ones(*sharding.local_shape(rank), 3), sharding=sharding, group=world())


def gather_another_shape(rank: int) -> None:
    sharding = TokenSharding(batch=2, seq=Partition((2, 1)))
    gather_tokens(torch.ones(2, 3, 3), sharding=sharding, group=world())


def gather_in_another_group(rank: int) -> None:
    sharding = TokenSharding(batch=2, seq=Partition((2, 1, 1)))
    gather_tokens(torch.ones(2, 1, 3), sharding=sharding, group=world())


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (
            gather_a_selection,
            "gather_tokens needs every token of the grid, but the ranks of this sharding hold 6 of 8",
        ),
        (gather_another_shape, "rank 1 has a tensor of shape (2, 3, 3), but its shard in order 'BL' is (2, 1)"),
        (gather_in_another_group, "the token sharding describes 3 ranks, but the group has 2"),
    ],
)
def test_what_cannot_be_gathered_is_refused(ask: Callable[[int], Any], text: str, rank_pool: RankPool) -> None:
    assert rank_pool.run(refused, 2, ask)[1].startswith(text)
