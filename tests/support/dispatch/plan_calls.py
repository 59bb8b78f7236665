"""A right call of ``plan_dispatch`` on three ranks, to be spoiled, and whether the ranks work on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_dispatch import (
    DispatchMetadata,
    Partition,
    TokenSharding,
    combine,
    dispatch,
    plan_dispatch,
)
from tests.support.ranks import world

RANKS = 3
ONE_WEIGHT = "each choice needs one floating-point weight"
EQUAL = (
    "they have to be equal, one piece per rank in the group's rank order (for a group that is part of a mesh: "
    "sharding.select(ranks))"
)
NO_GROUP = (
    "group is None; pass the process group explicitly, e.g. torch.distributed.group.WORLD once init_process_group "
    "has run, or device_mesh.get_group()"
)


@dataclass(frozen=True)
class Call:
    """What one rank passes to ``plan_dispatch``."""

    ids: Any
    weight: Any
    dim: Any
    sharding: TokenSharding
    experts: Partition

    def plan(self) -> DispatchMetadata:
        return plan_dispatch(
            self.ids,
            dim=self.dim,
            sharding=self.sharding,
            experts=self.experts,
            group=world(),
            weight_BlK=self.weight,
        )


Mistake = Callable[[Call], Call]


def good_call(rank: int) -> Call:
    """B = 2, L = 6 cut (3, 0, 3); six experts; K = 2."""
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 3)))
    shape = (*sharding.local_shape(rank), 2)
    ids_BlK = torch.arange(shape[0] * shape[1] * 2).view(shape) % 6
    return Call(ids_BlK, torch.full(shape, 0.5), 4, sharding, Partition((2, 2, 2)))


def works(rank: int) -> bool:
    """Whether the ranks plan, dispatch and combine as if nothing had been."""
    call = good_call(rank)
    plan = call.plan()
    x_MD, weight_M = dispatch(torch.full(plan.local_shape, 2.0), call.weight, plan)
    return combine(x_MD, plan, weight_M).equal(torch.full(plan.local_shape, 2.0))
