"""What crosses the wire: how many collectives, how many bytes, and that nothing of a layer stays behind.

Every operation that reaches a process group is recorded below Python's ``torch.distributed``, so that no collective
can go uncounted, in forward or in backward.
"""

import gc
import random
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dispatch import Partition, TokenSharding, combine, dispatch, plan_dispatch
from moe_dispatch.testing import RankPool
from tests.support.dispatch.dense import (
    crossings,
    make_case,
)
from tests.support.dispatch.layouts import EXPERTS, Layout, layouts
from tests.support.dispatch.plans import sharding_of
from tests.support.ranks import comes_true, world

ITERATIONS = 50
FORWARDS = 100


@dataclass(frozen=True)
class Call:
    """One collective: its name, the bytes this rank handed to it and the bytes it got."""

    name: str
    sent: int
    received: int


class Recorder(TorchDispatchMode):
    """Every operation on a process group, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            received, sent = args[:2] if func.name() == "c10d::alltoall_base_" else (None, None)
            self.calls.append(Call(func.name(), num_bytes(sent), num_bytes(received)))
        return func(*args, **kwargs or {})


def num_bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.itemsize


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A layout with its routing, and the widths and dtypes that move through it."""

    layout: Layout
    experts: tuple[int, ...]
    expert_BLK: Tensor
    dim: int
    width: int
    x_dtype: torch.dtype
    weight_dtype: torch.dtype


# ---- cases: what the ranks run -------------------------------------------------------------------------


def record_layer(rank: int, sizes: Sizes) -> tuple[list[Call], list[Call]]:
    """The collectives of one layer's forward and of its backward."""
    sharding = sharding_of(sizes.layout)
    expert_BlK = sharding.shard(sizes.expert_BLK, rank)
    shape = sharding.local_shape(rank)
    x_BlD = torch.ones(*shape, sizes.dim, dtype=sizes.x_dtype, requires_grad=True)
    weight_BlK = torch.ones(expert_BlK.shape, dtype=sizes.weight_dtype, requires_grad=True)
    with Recorder() as forward:
        plan = plan_dispatch(
            expert_BlK,
            dim=sizes.dim,
            sharding=sharding,
            experts=Partition(sizes.experts),
            group=world(),
            weight_BlK=weight_BlK,
        )
        x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
        y_MF = x_MD.sum(1, keepdim=True).expand(-1, sizes.width)
        y_BlF = combine(y_MF, plan, weight_M)
    with Recorder() as backward:
        y_BlF.sum().backward()
    return forward.calls, backward.calls


def record_all(rank: int, all_sizes: list[Sizes]) -> list[tuple[list[Call], list[Call]]]:
    return [record_layer(rank, sizes) for sizes in all_sizes]


class Numbers:
    """One rank's part of a small layer, with every tensor it makes watched."""

    def __init__(self, rank: int) -> None:
        ranks = dist.get_world_size()
        self.sharding = TokenSharding(batch=2, seq=Partition((3, *[1] * (ranks - 2), 0)[:ranks]))
        self.experts = Partition((2,) * ranks)
        shape = self.sharding.local_shape(rank)
        self.expert_BlK = torch.randint(
            -1, self.experts.total, (*shape, 3), generator=torch.Generator().manual_seed(rank)
        )
        self.x_BlD = torch.arange(float(shape[0] * shape[1] * 5)).view(*shape, 5) + 100 * rank
        self.weight_BlK = torch.full((*shape, 3), 0.5)
        self.made: list[weakref.ref[Tensor]] = []

    def layer(self, pause: Callable[[], float] = lambda: 0.0) -> Tensor:
        time.sleep(pause())
        plan = plan_dispatch(self.expert_BlK, dim=5, sharding=self.sharding, experts=self.experts, group=world())
        time.sleep(pause())
        x_MD, weight_M = dispatch(self.x_BlD, self.weight_BlK, plan)
        time.sleep(pause())
        y_BlD = combine(x_MD, plan, weight_M)
        self.made += map(weakref.ref, (plan.token_of_row_M, plan.row_of_entry_M, x_MD, weight_M, y_BlD))
        return y_BlD

    def left(self, before: int) -> tuple[int, int]:
        """Watched tensors that live on, and how many tensors there are more than ``before``."""

        def watched() -> int:
            return sum(made() is not None for made in self.made)

        comes_true(lambda: watched() == 0 and live_tensors() <= before)
        return watched(), live_tensors() - before


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def forwards_without_grad(rank: int) -> tuple[int, int]:
    """Watched tensors that live on after many forwards, and how many tensors there are more than before."""
    numbers = Numbers(rank)
    with torch.no_grad():
        numbers.layer()  # whatever is made once is made
        before = live_tensors()
        for _ in range(FORWARDS):
            numbers.layer()
    assert len(numbers.made) == 5 * (FORWARDS + 1)
    return numbers.left(before)


def forwards_with_backward(rank: int) -> tuple[int, int]:
    """As above, with a graph that is built and run through each time."""
    numbers = Numbers(rank)
    numbers.x_BlD.requires_grad_()
    numbers.layer().sum().backward()
    before = live_tensors()
    for _ in range(FORWARDS // 4):
        numbers.layer().sum().backward()
    return numbers.left(before)


def differing_repeats(rank: int) -> list[int]:
    """Which of many forwards and backwards, each rank late by another time, do not give the bits of the first."""
    late = random.Random(rank)
    numbers = Numbers(rank)
    numbers.x_BlD.requires_grad_()
    differing = []
    first = None
    for i in range(ITERATIONS + 1):
        y_BlD = numbers.layer(pause=lambda: late.uniform(0, 0.002))
        (grad_BlD,) = torch.autograd.grad(y_BlD, numbers.x_BlD, torch.ones_like(y_BlD))
        first = first or (y_BlD.detach(), grad_BlD)
        if not (first[0].equal(y_BlD) and first[1].equal(grad_BlD)):
            differing.append(i)
    return differing


# ---- what the tests ask --------------------------------------------------------------------------------


def sizes_to_try(ranks: int) -> list[Sizes]:
    """Each layout with three routings; the widths and dtypes take turns."""
    tried = []
    dtypes = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float32)]
    for i, (layout, routing) in enumerate(product(layouts(ranks), ("uniform", "holes", "one_rank"))):
        experts, num_choices = EXPERTS[ranks][i % 3], (3, 1, 8)[i // 3 % 3]
        case = make_case(layout, routing, experts=experts, num_choices=num_choices, dim=1, width=1)
        x_dtype, weight_dtype = dtypes[i // 2 % 3]
        tried.append(
            Sizes(
                layout=layout,
                experts=experts,
                expert_BLK=case.expert_BLK,
                dim=(7, 250)[i % 2],
                width=(3, 16)[i % 2],
                x_dtype=x_dtype,
                weight_dtype=weight_dtype,
            )
        )
    return tried


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_three_collectives_forward_and_two_backward_of_one_row_per_token_and_rank(
    rank_pool: RankPool, ranks: int
) -> None:
    torch.manual_seed(ranks)
    tried = sizes_to_try(ranks)
    for rank, results in enumerate(rank_pool.run(record_all, ranks, tried)):
        for sizes, (forward, backward) in zip(tried, results, strict=True):
            where = f"rank {rank} of {sizes}"
            assert [call.name for call in forward] == ["c10d::alltoall_base_"] * 3, where
            assert [call.name for call in backward] == ["c10d::alltoall_base_"] * 2, where
            check_bytes(forward, backward, rank, sizes, where)


def check_bytes(forward: list[Call], backward: list[Call], rank: int, sizes: Sizes, where: str) -> None:
    routing, rows, back = forward
    ranks, num_choices = len(sizes.experts), sizes.expert_BLK.shape[2]
    tokens = [piece[..., 0].numel() for piece in sizes.layout.cut(sizes.expert_BLK)]
    crossed = crossings(sizes.layout, sizes.experts, sizes.expert_BLK)
    own = crossed[rank][rank]  # these stay
    num_sent, num_received = sum(crossed[rank]) - own, sum(source[rank] for source in crossed) - own
    row, width = sizes.dim * sizes.x_dtype.itemsize, sizes.width * sizes.x_dtype.itemsize
    with_weights = row + num_choices * sizes.weight_dtype.itemsize
    whole_vectors = -(-with_weights // 16) * 16
    if 32 * (whole_vectors - with_weights) <= with_weights:  # at most 3 % longer
        with_weights = whole_vectors
    assert routing.sent <= ranks * max(1, tokens[rank]) * (2 * num_choices + 8), where
    assert routing.received <= sum(max(1, size) for size in tokens) * (2 * num_choices + 8), where
    assert (rows.sent, rows.received) == (num_sent * with_weights, num_received * with_weights), where
    assert (back.sent, back.received) == (num_received * width, num_sent * width), where
    # The backward of combine goes the way of dispatch, and that of dispatch the way of combine.
    out, home = backward
    assert (out.sent, out.received) == (num_sent * width, num_received * width), where
    assert (home.sent, home.received) == (num_received * with_weights, num_sent * with_weights), where


def test_ids_take_one_byte_up_to_255_experts_and_two_above_in_steps_of_4_bytes(rank_pool: RankPool) -> None:
    layout = Layout(batch=(2,), seq=(30, 20))
    for num_experts, id_bytes in ((255, 1), (256, 2)):
        sizes = Sizes(
            layout=layout,
            experts=(5, num_experts - 5),
            expert_BLK=torch.zeros(2, 50, 6, dtype=torch.int64),
            dim=3,
            width=3,
            x_dtype=torch.float32,
            weight_dtype=torch.float32,
        )
        routing = [forward[0].sent for forward, _ in rank_pool.run(record_layer, 2, sizes)]
        ids_of_token = {1: 8, 2: 12}[id_bytes]  # 6 ids, in steps of 4 bytes
        assert routing == [2 * (4 + 60 * ids_of_token), 2 * (4 + 40 * ids_of_token)]


def test_a_group_of_one_calls_no_collective(rank_pool: RankPool) -> None:
    torch.manual_seed(5)
    (results,) = rank_pool.run(record_all, 1, sizes_to_try(1))
    assert all(result == ([], []) for result in results)


def test_the_recorder_sees_other_collectives(rank_pool: RankPool) -> None:
    names = [["c10d::allreduce_", "c10d::barrier"]] * 2
    assert rank_pool.run(record_others, 2) == names


def record_others() -> list[str]:
    with Recorder() as recorder:
        dist.all_reduce(torch.ones(1))
        dist.barrier()
    return [call.name for call in recorder.calls]


@pytest.mark.parametrize("run", [forwards_without_grad, forwards_with_backward])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_leaves_nothing_behind(rank_pool: RankPool, ranks: int, run: Any) -> None:
    for watched, more in rank_pool.run(run, ranks):
        assert watched == 0
        assert more <= 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_late_ranks_do_not_change_a_bit(rank_pool: RankPool, ranks: int) -> None:
    assert rank_pool.run(differing_repeats, ranks) == [[]] * ranks
