"""heads_from_tokens and tokens_from_heads on tensors whose every value names its own place.

The number at (row, position, head, column) of the whole tensor is unique, so that the tensor *between* the two
exchanges can be compared with the slice it has to be: two wrong permutations can cancel in a round trip.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool, RankThreads
from moe_dispatch.testing.counting import counting
from sp_attention import heads_from_tokens, tokens_from_heads
from tests.support.attention.batches import Order
from tests.support.ranks import refusal, world
from tests.support.tensors import same_bits, scattered

pytestmark = pytest.mark.usefixtures("uncovered")

Sizes = tuple[int, ...]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
MEMORIES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "heads before tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other column": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "every other token": lambda x: torch.stack([x, x + 1], dim=2).flatten(1, 2)[:, ::2],
}


def coded(batch: int, length: int, heads: int, width: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """(B, L, N, H), each value another integer."""
    number = torch.arange(batch * length * heads * width)
    return number.view(batch, length, heads, width).to(dtype)


def in_order(x_BLNH: Tensor, order: Order) -> Tensor:
    return x_BLNH if order == "BL" else x_BLNH.transpose(0, 1)


def my_tokens(whole_BLNH: Tensor, seq: Sizes, rank: int) -> Tensor:
    start = sum(seq[:rank])
    return whole_BLNH[:, start : start + seq[rank]]


def my_heads(whole_BLNH: Tensor, heads: Sizes, rank: int) -> Tensor:
    start = sum(heads[:rank])
    return whole_BLNH[:, :, start : start + heads[rank]]


def cuts(total: int, ranks: int) -> list[Sizes]:
    """Balanced, everything on the first, on the last, and uneven with an empty piece."""
    balanced = tuple(len(range(rank, total, ranks)) for rank in range(ranks))
    first, last = (total, *[0] * (ranks - 1)), (*[0] * (ranks - 1), total)
    uneven = (total // 3, *[0] * (ranks - 2), total - total // 3) if ranks > 1 else (total,)
    return list(dict.fromkeys([balanced, first, last, uneven]))


def traded(rank: int, batch: int, seq: Sizes, heads: Sizes, order: Order, width: int = 3) -> list[str]:
    """What differs: the tensor between the exchanges, the way back, and the gradient of each."""
    sharding, partition = TokenSharding(batch=batch, seq=Partition(seq), order=order), Partition(heads)
    whole_BLNH = coded(batch, sum(seq), sum(heads), width, torch.float64)
    back_BLNH = whole_BLNH.flip(0, 1, 2, 3) * 3 + 1
    tokens_BlNH, tokens_back_BlNH = (in_order(my_tokens(x, seq, rank), order) for x in (whole_BLNH, back_BLNH))
    heads_BLnH, heads_back_BLnH = (in_order(my_heads(x, heads, rank), order) for x in (whole_BLNH, back_BLNH))
    x_BlNH, y_BLnH = (x.clone().requires_grad_() for x in (tokens_BlNH, heads_BLnH))
    between_BLnH = heads_from_tokens(x_BlNH, sharding=sharding, heads=partition, group=world())
    again_BlNH = tokens_from_heads(between_BLnH.detach(), sharding=sharding, heads=partition, group=world())
    out_BlNH = tokens_from_heads(y_BLnH, sharding=sharding, heads=partition, group=world())
    between_BLnH.backward(heads_back_BLnH)
    out_BlNH.backward(tokens_back_BlNH)
    assert x_BlNH.grad is not None
    assert y_BLnH.grad is not None
    checks = {
        "between": (between_BLnH.detach(), heads_BLnH),
        "round trip": (again_BlNH, tokens_BlNH),
        "back": (out_BlNH.detach(), tokens_BlNH),
        "gradient of heads_from_tokens": (x_BlNH.grad, tokens_back_BlNH),
        "gradient of tokens_from_heads": (y_BLnH.grad, heads_back_BLnH),
    }
    return [f"{name}: {batch, seq, heads, order}" for name, pair in checks.items() if not same_bits(*pair)]


def traded_in_every_way(rank: int) -> list[str]:
    ranks, failures = world().size(), []
    for batch, length, num_heads, order in product((1, 2), (0, 1, ranks + 1, 7), (1, 3, 4), ("BL", "LB")):
        for seq, heads in product(cuts(length, ranks), cuts(num_heads, ranks)):
            failures += traded(rank, batch, seq, heads, order)
    return failures


def traded_from_any_memory(rank: int) -> list[str]:
    """Of any dtype, strides and width, 0 too."""
    seq, heads = (2, 0, 3), (1, 3, 0)
    partition, failures = Partition(heads), []
    for dtype, (memory, stride), width, order in product(DTYPES, MEMORIES.items(), (0, 1, 2), ("BL", "LB")):
        sharding = TokenSharding(batch=2, seq=Partition(seq), order=order)
        whole_BLNH = coded(2, 5, 4, width, dtype)
        mine_BlNH = stride(in_order(my_tokens(whole_BLNH, seq, rank), order))
        between_BLnH = heads_from_tokens(mine_BlNH, sharding=sharding, heads=partition, group=world())
        right = same_bits(between_BLnH, in_order(my_heads(whole_BLNH, heads, rank), order))
        again_BlNH = tokens_from_heads(stride(between_BLnH), sharding=sharding, heads=partition, group=world())
        if not right or not same_bits(again_BlNH, mine_BlNH):
            failures.append(f"{dtype} {memory} {width} {order}")
    return failures


def shape_and_values(rank: int, num_heads: int) -> tuple[list[tuple[int, ...]], list[str]]:
    """Report 3, 1: sequence-first [8, 2, 4, 3] on two ranks."""
    sharding, heads = TokenSharding(batch=2, seq=Partition.even(8, 2), order="LB"), Partition.even(num_heads, 2)
    whole_BLNH = coded(2, 8, num_heads, 3, torch.float32)
    x_lBNH = my_tokens(whole_BLNH, (4, 4), rank).transpose(0, 1).contiguous().requires_grad_()
    between_LBnH = heads_from_tokens(x_lBNH, sharding=sharding, heads=heads, group=world())
    out_lBNH = tokens_from_heads(between_LBnH * 2, sharding=sharding, heads=heads, group=world())
    out_lBNH.backward(x_lBNH.detach())
    assert x_lBNH.grad is not None
    checks = {
        "between": same_bits(between_LBnH, my_heads(whole_BLNH, heads.sizes, rank).transpose(0, 1)),
        "output": same_bits(out_lBNH, 2 * x_lBNH),
        "gradient": same_bits(x_lBNH.grad, 2 * x_lBNH.detach()),
    }
    shapes = [tuple(x.shape) for x in (x_lBNH, between_LBnH, out_lBNH)]
    return shapes, [name for name, right in checks.items() if not right]


def one_after_another(rank: int) -> list[str]:
    """Report 2: three heads, then four, then others, in one process; backward in the order of the forwards."""
    kept, failures = [], []
    for num_heads in (3, 4, 6, 12, 1, 3):
        heads = Partition.balanced(num_heads, world().size())
        sharding = TokenSharding(batch=2, seq=Partition.balanced(5, world().size()))
        whole_BLNH = coded(2, 5, num_heads, 2, torch.float64)
        x_BlNH = my_tokens(whole_BLNH, sharding.seq.sizes, rank).clone().requires_grad_()
        between_BLnH = heads_from_tokens(x_BlNH, sharding=sharding, heads=heads, group=world())
        if not same_bits(between_BLnH, my_heads(whole_BLNH, heads.sizes, rank)):
            failures.append(f"{num_heads} heads")
        kept.append(
            (num_heads, x_BlNH, tokens_from_heads(between_BLnH, sharding=sharding, heads=heads, group=world()))
        )
    for num_heads, x_BlNH, out_BlNH in kept:
        out_BlNH.backward(x_BlNH.detach())
        if x_BlNH.grad is None or not same_bits(x_BlNH.grad, x_BlNH.detach()):
            failures.append(f"gradient of {num_heads} heads")
    return failures


def gradient_of_a_gradient(rank: int, seq: Sizes) -> bool:
    """The exchange is linear: the gradient of <a, E x> in a is E x."""
    sharding, heads = TokenSharding(batch=2, seq=Partition(seq)), Partition((1, 2))
    torch.manual_seed(rank)
    x_BlNH = torch.randn(2, seq[rank], 3, 2, dtype=torch.float64, requires_grad=True)
    between_BLnH = heads_from_tokens(x_BlNH, sharding=sharding, heads=heads, group=world())
    back_BLnH = torch.randn_like(between_BLnH).requires_grad_()
    (grad_BlNH,) = torch.autograd.grad(between_BLnH, x_BlNH, back_BLnH, create_graph=True)
    (again_BLnH,) = torch.autograd.grad(grad_BlNH, back_BLnH, x_BlNH.detach())
    return same_bits(again_BLnH, between_BLnH.detach())


def refusals() -> dict[str, str]:
    """The text of each refusal; one rank's shape is refused on that rank, before the collective."""
    rank = world().rank()
    x_BlNH, y_BLnH = torch.zeros(2, (4, 1)[rank], 4, 6), torch.zeros(2, 5, (1, 3)[rank], 6)
    of_three = TokenSharding(batch=2, seq=Partition((3, 2, 1)))

    def spread(x: Tensor = x_BlNH, **changed: Any) -> Tensor:
        right: dict[str, Any] = {"sharding": short_last(), "heads": Partition((1, 3)), "group": world()}
        return heads_from_tokens(x, **(right | changed))

    def collect(x: Tensor = y_BLnH, **changed: Any) -> Tensor:
        right: dict[str, Any] = {"sharding": short_last(), "heads": Partition((1, 3)), "group": world()}
        return tokens_from_heads(x, **(right | changed))

    calls: dict[str, Callable[[], Tensor]] = {
        "no group": lambda: spread(group=None),
        "sharding of three": lambda: spread(sharding=of_three),
        "heads of three": lambda: spread(heads=Partition((1, 2, 1))),
        "batch cut": lambda: collect(sharding=TokenSharding(batch=Partition((1, 1)), seq=5)),
        "a selection": lambda: collect(sharding=of_three.select((0, 1))),
        "tokens short": lambda: spread(x_BlNH[:, 1:]),
        "tokens in another order": lambda: spread(sharding=short_last("LB")),
        "heads short": lambda: spread(x_BlNH[:, :, 1:]),
        "no width": lambda: spread(x_BlNH[..., 0]),
        "tokens for heads": lambda: collect(x_BlNH),
        "other heads": lambda: collect(heads=Partition((2, 2))),
    }
    with counting() as counts:
        texts = {name: refusal(call) for name, call in calls.items()}
    assert counts.collectives == []
    return texts


def short_last(order: Order = "BL") -> TokenSharding:
    return TokenSharding(batch=2, seq=Partition((4, 1)), order=order)


@pytest.mark.parametrize("order", ["BL", "LB"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_report_1_the_tensor_between_the_exchanges(rank_pool: RankPool, ranks: int, order: Order) -> None:
    """Invariant 1. DeepSpeed #5664: the source rank goes next to the heads. Two rows, several heads on each rank."""
    assert rank_pool.run(traded, ranks, 2, (3,) * ranks, (2,) * ranks, order) == [[]] * ranks


@pytest.mark.parametrize("num_heads", [4, 16])
def test_report_3_sequence_first(rank_pool: RankPool, num_heads: int) -> None:
    """B1, DeepSpeed #7868: wanted (4, 2, 4, 3), got (2, 16, 1, 3); with 16 heads backward raised too."""
    shapes = [(4, 2, num_heads, 3), (8, 2, num_heads // 2, 3), (4, 2, num_heads, 3)]
    assert rank_pool.run(shape_and_values, 2, num_heads) == [(shapes, [])] * 2


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_report_2_three_heads_then_four_in_one_process(rank_pool: RankPool, ranks: int) -> None:
    """B3, DeepSpeed #6774: what one exchange was told must not reach the next, in forward or in backward."""
    assert rank_pool.run(one_after_another, ranks) == [[]] * ranks


@pytest.mark.parametrize("heads", [(2, 1), (2, 2), (3, 3), (6, 6), (1, 0), (0, 3)])
def test_report_2_uneven_heads_on_two_ranks(rank_threads: RankThreads, heads: Sizes) -> None:
    """B2: lengths 3 and 2, with three heads and with four."""
    assert rank_threads.run(traded, 2, 2, (3, 2), heads, "BL") == [[]] * 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_uneven_everything(rank_threads: RankThreads, ranks: int) -> None:
    """Invariant 1: between the exchanges, and there and back."""
    assert rank_threads.run(traded_in_every_way, ranks) == [[]] * ranks


MANY: dict[str, Callable[[int], tuple[Sizes, Sizes]]] = {
    "fewer tokens and heads than ranks": lambda ranks: (scattered(5, ranks), scattered(3, ranks)),
    "all on two ranks": lambda ranks: ((*(0,) * (ranks - 1), 4), (3, *(0,) * (ranks - 1))),
    "one more than ranks": lambda ranks: ((2, *(1,) * (ranks - 1)), (*(1,) * (ranks - 1), 2)),
    "no token": lambda ranks: ((0,) * ranks, scattered(3, ranks)),
}


FEW_OF_64 = [(64, "BL", "fewer tokens and heads than ranks"), (64, "LB", "one more than ranks")]


@pytest.mark.parametrize(("ranks", "order", "name"), [*product([16], ["BL", "LB"], MANY), *FEW_OF_64])
def test_many_ranks(rank_threads: RankThreads, ranks: int, order: Order, name: str) -> None:
    """Invariant 1."""
    seq, heads = MANY[name](ranks)
    assert rank_threads.run(traded, ranks, 2, seq, heads, order) == [[]] * ranks


def test_any_dtype_memory_and_width(rank_threads: RankThreads) -> None:
    assert rank_threads.run(traded_from_any_memory, 3) == [[]] * 3


@pytest.mark.parametrize("seq", [(2, 1), (3, 0)])
def test_the_gradient_has_a_gradient(rank_threads: RankThreads, seq: Sizes) -> None:
    assert rank_threads.run(gradient_of_a_gradient, 2, seq) == [True, True]


def texts(rank: int) -> dict[str, str]:
    length, n = (4, 1)[rank], (1, 3)[rank]
    of_three = (
        "describes 3 ranks, but the group has 2; they have to be equal, one piece per rank in the group's rank order "
        "(for a group that is part of a mesh: sharding.select(ranks))"
    )
    shape, shard = f"rank {rank} has a tensor of shape", f"as sharding.shard(x, {rank}) cuts them"
    tokens = f"its tokens with all heads are (2, {length}, 4, 'H') in order 'BL', {shard}"
    heads = "as heads_from_tokens gives them"
    return {
        "no group": "group is None; pass the process group explicitly, e.g. torch.distributed.group.WORLD once "
        "init_process_group has run, or device_mesh.get_group()",
        "sharding of three": f"the token sharding {of_three}",
        "heads of three": f"the partition of heads {of_three}",
        "batch cut": "the batch is cut into (1, 1), but attention needs each rank to hold a part of every sequence; "
        "describe the one row of the mesh that this group is: batch=<its rows>, an int",
        "a selection": "attention needs every token of the grid, but the ranks of this sharding hold 10 of 12; "
        "describe the tokens that this group holds, not a selection of a larger mesh",
        "tokens short": f"{shape} (2, {length - 1}, 4, 6); {tokens}",
        "tokens in another order": f"{shape} (2, {length}, 4, 6); its tokens with all heads are "
        f"({length}, 2, 4, 'H') in order 'LB', {shard}",
        "heads short": f"{shape} (2, {length}, 3, 6); {tokens}",
        "no width": f"{shape} (2, {length}, 4); {tokens}",
        "tokens for heads": f"{shape} (2, {length}, 4, 6); all tokens of its heads are (2, 5, {n}, 'H') in order "
        f"'BL', {heads}",
        "other heads": f"{shape} (2, 5, {n}, 6); all tokens of its heads are (2, 5, 2, 'H') in order 'BL', {heads}",
    }


def test_wrong_arguments_are_refused_before_the_collective(rank_pool: RankPool) -> None:
    assert rank_pool.run(refusals, 2) == [texts(0), texts(1)]
