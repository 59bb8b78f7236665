"""The plan of counted sizes: every field of one drawn by hand, equality, ids of one byte and two."""

import dataclasses
from collections.abc import Hashable
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import (
    DispatchMetadata,
    Partition,
    TokenSharding,
    dispatch,
    plan_dispatch,
)
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.dense import (
    Case,
    make_case,
)
from tests.support.dispatch.layouts import EXPERTS, Layout
from tests.support.dispatch.plans import sharding_of
from tests.support.ranks import world


def plan_by_hand(rank: int) -> dict[str, Any]:
    shape = (2, 2, 2) if rank == 0 else (2, 1, 2)
    ids = [2, 0, 1, 1, 2, -1, 2, 1] if rank == 0 else [0, 1, -1, -1]
    plan = plan_dispatch(
        torch.tensor(ids).view(shape),
        dim=4,
        sharding=TokenSharding(batch=2, seq=Partition((2, 1))),
        experts=Partition((2, 1)),
        group=world(),
    )
    names = [f.name for f in (*dataclasses.fields(plan), *dataclasses.fields(plan.index))]
    values = {name: getattr(plan, name) for name in names if name not in ("group", "row_index")}
    assert plan.group is world()
    dtypes = {value.dtype for value in values.values() if isinstance(value, Tensor)}
    assert dtypes == {torch.int64}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}


def test_a_plan_drawn_by_hand(rank_pool: RankPool) -> None:
    # Global tokens of B = 2 rows, L = 3      choices of each token             experts 0, 1 | 2
    #   rank 0 | rank 1                         (2, 0) (1, 1) | (0, 1)            rank 0     | rank 1
    #    0  1  |   2                            (2, -) (2, 1) | (-, -)
    #    3  4  |   5
    #
    # rank 0 sends 0 3 4 to rank 1, and 0 1 4 to itself; rank 1 sends 2 to rank 0.
    # rank 0 receives 2 0 1 4 and makes of them the rows   expert 0: 0 2, expert 1: 1 1 2 4.
    # rank 1 receives 0 3 4 and makes of them the rows     expert 2: 0 3 4.
    shared = {"sharding": TokenSharding(batch=2, seq=Partition((2, 1))), "experts": Partition((2, 1))}
    rank_0 = {
        "rank": 0,
        "local_shape": (2, 2, 4),
        "rows_sent": (3, 3),
        "rows_received": (3, 1),
        "expert_BlK": [[[2, 0], [1, 1]], [[2, -1], [2, 1]]],
        "rows_per_expert_e": [2, 4],
        "token_of_row_M": [0, 2, 1, 1, 2, 4],
        "received_of_row_M": [1, 0, 2, 2, 0, 3],
        "choice_of_row_M": [1, 0, 0, 1, 1, 1],
        "token_of_sent_S": [0, 2, 3, 0, 1, 3],
        "sent_of_entry_S": [3, 0, 4, 1, 5, 2],  # tokens 0: to ranks 0 and 1, 1: to 0, 3: to 1, 4: to 0 and 1
        "first_entry_t": [0, 2, 3, 4],
        "row_of_entry_M": [1, 4, 0, 2, 3, 5],  # received 2: two rows, 0: one, 1: two, 4: one
        "first_entry_R": [0, 2, 3, 5],
    }
    rank_1 = {
        "rank": 1,
        "local_shape": (2, 1, 4),
        "rows_sent": (1, 0),
        "rows_received": (3, 0),
        "expert_BlK": [[[0, 1]], [[-1, -1]]],
        "rows_per_expert_e": [3],
        "token_of_row_M": [0, 3, 4],
        "received_of_row_M": [0, 1, 2],
        "choice_of_row_M": [0, 0, 0],
        "token_of_sent_S": [0],
        "sent_of_entry_S": [0],
        "first_entry_t": [0, 1],  # token 5 has no entry: the next starts where it does
        "row_of_entry_M": [0, 1, 2],
        "first_entry_R": [0, 1, 2],
    }
    assert rank_pool.run(plan_by_hand, 2) == [rank_0 | shared, rank_1 | shared]


def ids_after_reuse(rank: int) -> bool:
    """Whether a plan keeps its ids when their tensor is filled for the next layer."""
    sharding = TokenSharding(batch=1, seq=Partition((2,) * dist.get_world_size()))
    ids_BlK = torch.zeros(1, 2, 2, dtype=torch.int64)
    plan = plan_dispatch(
        ids_BlK, dim=1, sharding=sharding, experts=Partition((2,) * dist.get_world_size()), group=world()
    )
    ids_BlK.fill_(1)
    return plan.expert_BlK.equal(torch.zeros_like(ids_BlK))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plan_keeps_its_ids_when_their_tensor_is_reused(rank_threads: RankThreads, ranks: int) -> None:
    assert rank_threads.run(ids_after_reuse, ranks) == [True] * ranks


def replay(rank: int, case: Case) -> dict[str, bool]:
    """A plan from saved ids against the first; plans of other ids; and whether a plan can be written to."""

    def plan(ids_BLK: Tensor, dim: int = 7) -> DispatchMetadata:
        expert_BlK = case.layout.cut(ids_BLK)[rank]
        sharding, experts = sharding_of(case.layout), Partition(case.experts)
        return plan_dispatch(expert_BlK, dim=dim, sharding=sharding, experts=experts, group=world())

    first = plan(case.expert_BLK)
    other_BLK = (case.expert_BLK + 1) % sum(case.experts)
    saved = plan_dispatch(first.expert_BlK, dim=7, sharding=first.sharding, experts=first.experts, group=first.group)
    frozen = {}
    for field in dataclasses.fields(first):
        try:
            setattr(first, field.name, None)
        except dataclasses.FrozenInstanceError:
            frozen[field.name] = True
    return {
        "saved == first": saved == first and first == saved,
        "saved is first": saved is first,
        "other ids == first": plan(other_BLK) == first,
        "other dim == first": plan(case.expert_BLK, dim=8) == first,
        "equal to something else": first == "a plan",
        "all frozen": len(frozen) == len(dataclasses.fields(first)),
        "hashable": isinstance(first, Hashable),
        "needs a gradient": any(t.requires_grad for t in vars_of(first)),
    }


def vars_of(plan: DispatchMetadata) -> list[Tensor]:
    values = (getattr(holder, f.name) for holder in (plan, plan.index) for f in dataclasses.fields(holder))
    return [value for value in values if isinstance(value, Tensor)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_plan_from_saved_ids_equals_the_first(rank_threads: RankThreads, ranks: int) -> None:
    torch.manual_seed(140)
    layout = Layout(batch=(2,), seq=(3,) * ranks)  # no shard is empty: other ids are other ids on every rank
    case = make_case(layout, "uniform", experts=EXPERTS[ranks][0], num_choices=2, dim=7, width=7)
    for said in rank_threads.run(replay, ranks, case):
        assert said == {
            "saved == first": True,
            "saved is first": False,
            "other ids == first": False,
            "other dim == first": False,
            "equal to something else": False,
            "all frozen": True,
            "hashable": False,
            "needs a gradient": False,
        }


def plans_that_differ_on_one_sharding(rank: int) -> list[str]:
    """Layers of other experts, K, D and dtypes in turns, on one sharding object and on a fresh one each time."""

    def sharding() -> TokenSharding:
        return TokenSharding(batch=2, seq=Partition((3, 1)))

    shared, failures = sharding(), []
    for experts, num_choices, dim, dtype in 2 * list(
        product(((3, 1), (1, 3), (2, 300)), (1, 5), (1, 2), (torch.float32, torch.bfloat16))
    ):
        ids = torch.randint(-1, sum(experts), (*shared.local_shape(rank), num_choices))
        on_shared, on_fresh = (
            plan_dispatch(ids, dim=dim, sharding=cut, experts=Partition(experts), group=world(), dtype=dtype)
            for cut in (shared, sharding())
        )
        if on_shared != on_fresh:
            failures.append(f"{experts} {num_choices} {dim} {dtype}")
    return failures


def test_plans_of_different_layers_share_a_sharding(rank_threads: RankThreads) -> None:
    assert rank_threads.run(plans_that_differ_on_one_sharding, 2) == [[], []]


def rows_of_many_experts(rank: int, sizes: tuple[int, int]) -> tuple[list[int], list[int], list[int]]:
    """Ids at both ends of both ranks' experts, and no expert, where ids start to need a second byte."""
    last = sum(sizes) - 1
    ids = torch.tensor([0, sizes[0] - 1, sizes[0], last, -1, last - 1]).view(1, 6, 1)
    sharding = TokenSharding(batch=1, seq=Partition((6, 0)))
    plan = plan_dispatch(sharding.shard(ids, rank), dim=1, sharding=sharding, experts=Partition(sizes), group=world())
    x_BlD = sharding.shard(torch.arange(6.0).view(1, 6, 1), rank)
    x_MD, _ = dispatch(x_BlD, x_BlD, plan)
    experts_of_rows = plan.rows_per_expert_e.nonzero()[:, 0].tolist()
    return experts_of_rows, plan.token_of_row_M.tolist(), x_MD[:, 0].int().tolist()


@pytest.mark.parametrize("sizes", [(200, 54), (200, 55), (200, 56), (200, 57), (3, 32763)])
def test_ids_at_the_ends_of_what_a_byte_and_two_can_say(rank_pool: RankPool, sizes: tuple[int, int]) -> None:
    last = sizes[1] - 1
    assert rank_pool.run(rows_of_many_experts, 2, sizes) == [
        ([0, sizes[0] - 1], [0, 1], [0, 1]),
        ([0, last - 1, last], [2, 5, 3], [2, 5, 3]),
    ]


def rows_of_crowded_token(rank: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Four choices of one token, all on rank 1, two of them the same expert."""
    sharding = TokenSharding(batch=1, seq=Partition((1, 0)))
    ids = torch.tensor([[[5, 3, 5, 4]]])[:, : 1 - rank]
    plan = plan_dispatch(ids, dim=3, sharding=sharding, experts=Partition((3, 3)), group=world())
    return plan.rows_sent, plan.rows_received, len(plan.token_of_row_M)


def test_a_token_crosses_to_a_rank_once(rank_threads: RankThreads) -> None:
    assert rank_threads.run(rows_of_crowded_token, 2) == [((0, 1), (0, 0), 0), ((0, 0), (1, 0), 4)]
