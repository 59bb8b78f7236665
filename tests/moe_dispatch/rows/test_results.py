"""What a caller may do with the results."""

import pytest
import torch

from moe_dispatch import (
    Partition,
    StaticSizes,
    TokenSharding,
    combine,
    dispatch,
    plan_dispatch,
    plan_static,
)
from moe_dispatch.testing import RankThreads
from tests.support.ranks import world


def add_to_results_in_place(rank: int, static: bool) -> list[str]:
    """A residual added in place, to the rows and to the output, against the same out of place."""
    sharding, experts = TokenSharding(batch=2, seq=Partition((3, 2))), Partition((2, 1))
    torch.manual_seed(rank)
    expert_BlK = torch.rand(*sharding.local_shape(rank), 3).topk(2).indices
    weight_BlK = torch.rand(*sharding.local_shape(rank), 2, dtype=torch.float64)
    x_BlD = torch.randn(*sharding.local_shape(rank), 5, dtype=torch.float64, requires_grad=True)
    given = {"dim": 5, "sharding": sharding, "experts": experts, "group": world()}
    if static:
        plan = plan_static(expert_BlK, **given, sizes=StaticSizes(rows_per_pair=6, rows=20))
    else:
        plan = plan_dispatch(expert_BlK, **given)
    found = []
    for in_place in (True, False):
        x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
        x_MD = x_MD.add_(1) if in_place else x_MD + 1
        y_BlD = combine(x_MD, plan, weight_M)
        if in_place:
            y_BlD += x_BlD
        else:
            y_BlD = y_BlD + x_BlD
        found.append((y_BlD.detach(), torch.autograd.grad(y_BlD.square().sum(), x_BlD)[0]))
    return [name for name, one, other in zip(("y", "x"), *found, strict=True) if not one.equal(other)]


@pytest.mark.parametrize("static", [False, True])
def test_results_can_be_written_to(rank_threads: RankThreads, static: bool) -> None:
    assert rank_threads.run(add_to_results_in_place, 2, static) == [[], []]
