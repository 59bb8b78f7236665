"""Rows of float8: they travel as they are, and come back in a dtype that has sums."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, combine, dispatch
from moe_dispatch.testing import RankThreads
from tests.support.dispatch.plans import KINDS, Kind, crowded, enough, planning, sharding_of
from tests.support.ranks import refusal

RANKS = 4
CASE = crowded(RANKS, seed=3)
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


def inputs(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, ids and weights of the rank."""
    x_BlD, ids_BlK = (CASE.layout.cut(whole)[rank] for whole in (CASE.x_BLD, CASE.expert_BLK))
    return x_BlD, ids_BlK, torch.linspace(0, 1, ids_BlK.numel()).view(ids_BlK.shape)


def plan_of(planned: Any, ids_BlK: Tensor) -> Any:
    return planned(
        ids_BlK, dim=CASE.x_BLD.shape[-1], sharding=sharding_of(CASE.layout), experts=Partition(CASE.experts)
    )


def there_and_back(rank: int, kind: Kind, dtype: torch.dtype) -> list[bool]:
    """Whether rows, weights and what comes back in bfloat16 have the bits of the same numbers in bfloat16."""
    x_BlD, ids_BlK, weight_BlK = inputs(rank)
    with planning(kind, rank, enough(CASE)) as planned:
        plan = plan_of(planned, ids_BlK)
        x_MD, weight_M = dispatch(x_BlD.to(dtype), weight_BlK, plan)
        wanted_MD, wanted_M = dispatch(x_BlD.to(dtype).bfloat16(), weight_BlK, plan)
        y_BlD, wanted_BlD = (combine(x.bfloat16(), plan, weight_M) for x in (x_MD, wanted_MD))
    return [
        x_MD.dtype == dtype,
        torch.equal(x_MD.bfloat16(), wanted_MD),
        torch.equal(weight_M, wanted_M),
        torch.equal(y_BlD, wanted_BlD),
    ]


def refusals(rank: int) -> list[str]:
    x_BlD, ids_BlK, weight_BlK = inputs(rank)
    low_BlD = x_BlD.to(FLOAT8[0])
    with planning("counted", rank, enough(CASE)) as planned:
        plan = plan_of(planned, ids_BlK)
        x_MD, _ = dispatch(low_BlD, weight_BlK, plan)
        leaf = weight_BlK.clone().requires_grad_()
        with torch.no_grad():  # an evaluation, of parameters that can be trained
            dispatch(low_BlD, leaf, plan)
        return [
            refusal(lambda: dispatch(low_BlD.clone().requires_grad_(), weight_BlK, plan)),
            refusal(lambda: dispatch(low_BlD, leaf, plan)),
            refusal(lambda: dispatch(x_BlD, leaf.to(FLOAT8[1]), plan)),
            refusal(lambda: combine(x_MD, plan)),
        ]


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_float8_travel_as_they_are(kind: Kind, dtype: torch.dtype, rank_threads: RankThreads) -> None:
    assert rank_threads.run(there_and_back, RANKS, kind, dtype) == [[True] * 4] * RANKS


def test_what_would_be_a_sum_in_float8_is_refused(rank_threads: RankThreads) -> None:
    """Before: dispatch passed, and torch's sum of bags refused in backward, or in combine."""
    with_gradient = (
        "with a gradient, which is a sum in that dtype, and there is none; detach rows and weights, or dispatch "
        "them in torch.bfloat16"
    )
    for rank, texts in enumerate(rank_threads.run(refusals, RANKS)):
        assert texts == [
            f"rank {rank}: rows or weights of torch.float8_e4m3fn {with_gradient}",
            f"rank {rank}: rows or weights of torch.float8_e4m3fn {with_gradient}",
            f"rank {rank}: rows or weights of torch.float8_e5m2 {with_gradient}",
            f"rank {rank}: y is torch.float8_e4m3fn, in which there are no sums; pass it in torch.bfloat16 or a "
            "wider dtype, whatever the dtype of the rows of dispatch",
        ]
