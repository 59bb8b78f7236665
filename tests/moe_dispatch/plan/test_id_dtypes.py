"""Expert ids of int32, as routers of inference engines give them, make the plan of int64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import HierarchicalPlan, Partition, TokenSharding, plan_dispatch
from moe_dispatch.testing import RankThreads
from tests.support.dispatch.layer import Layer
from tests.support.dispatch.plans import KINDS, Kind, crowded, enough, planning
from tests.support.ranks import refusal, world

RANKS = 4
CASE = crowded(RANKS, seed=3)  # with ids of -1
DTYPES = {
    "all": (torch.int32,) * RANKS,
    "some": (torch.int64, torch.int32, torch.int32, torch.int64),
}


def same_plan(rank: int, kind: Kind, dtypes: tuple[torch.dtype, ...]) -> list[bool]:
    """Whether plan, output and gradients are those of int64 ids."""
    found: list[bool] = []
    with planning(kind, rank, enough(CASE)) as plan_of:

        def of_dtype(ids_BlK: Tensor, **given: Any) -> Any:
            return plan_of(ids_BlK.to(dtypes[rank]), **given)

        wanted, got = Layer(rank, CASE, plan_of), Layer(rank, CASE, of_dtype)
        plans = [(wanted.plan, got.plan)]
        if isinstance(got.plan, HierarchicalPlan):
            plans = [(wanted.plan.between, got.plan.between), (wanted.plan.within, got.plan.within)]
        found += [ours == theirs for ours, theirs in plans]
        found += [got.plan.expert_BlK.dtype == torch.int64]
        one, other = wanted.backward(), got.backward()
        found += [
            torch.equal(getattr(one, name), getattr(other, name)) for name in ("y", "x", "weight", "logits", "w")
        ]
    return found


@pytest.mark.parametrize("which", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_plans_of_int32_are_those_of_int64(kind: Kind, which: str, rank_threads: RankThreads) -> None:
    for found in rank_threads.run(same_plan, RANKS, kind, DTYPES[which]):
        assert len(found) >= 7
        assert all(found)


def largest(rank: int) -> str:
    """On rank 1 an id to which 1 cannot be added in int32."""
    ids_BlK = torch.full((1, 2, 1), 2**31 - 1 if rank == 1 else 0, dtype=torch.int32)
    sharding, experts = TokenSharding(batch=1, seq=Partition((2, 2))), Partition((1, 1))
    return refusal(lambda: plan_dispatch(ids_BlK, dim=1, sharding=sharding, experts=experts, group=world()))


def test_the_largest_int32_is_out_of_range(rank_threads: RankThreads) -> None:
    text = "rank 1: expert id 2147483647 at local token 0, choice 0; ids are 0 to 1, or -1 for no expert"
    assert rank_threads.run(largest, 2) == [text] * 2
