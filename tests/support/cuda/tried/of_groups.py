"""The operations of ``moe_dispatch`` that know no expert."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import (
    Partition,
    StaticSizes,
    TokenSharding,
    agree,
    exchange_rows,
    gather_sharding,
    gather_tokens,
    place_tokens,
    plan_static,
)
from tests.support.ranks import world

from .of_experts import DIM, drawn, tokens_of_ranks
from .operation import Operation, Place, Step


def gathering(rank: int, place: Place) -> Step:
    _, _, x = map(place.tensor, drawn(rank))
    sharding = tokens_of_ranks()
    return Step(lambda: [gather_tokens(x, sharding=sharding, group=world())], (x,))


def gathering_evenly(rank: int, place: Place) -> Step:
    """One message of a rank to all."""
    sharding = TokenSharding(batch=2, seq=Partition.even(2 * dist.get_world_size(), dist.get_world_size()))
    draw = torch.Generator().manual_seed(rank)
    x = place.tensor(torch.randn(*sharding.local_shape(rank), DIM, generator=draw).requires_grad_())
    return Step(lambda: [gather_tokens(x, sharding=sharding, group=world())], (x,))


def planning_evenly(rank: int, place: Place) -> Step:
    """The same of ids."""
    ranks = dist.get_world_size()
    sharding, experts = TokenSharding(batch=2, seq=Partition.even(2 * ranks, ranks)), Partition.even(2 * ranks, ranks)
    ids = place.tensor(torch.arange(12).view(*sharding.local_shape(rank), 3) * (rank + 1) % (2 * ranks))
    call = {"dim": DIM, "sharding": sharding, "experts": experts, "group": world()}
    return Step(
        lambda: [plan_static(ids, sizes=StaticSizes(rows_per_pair=12, rows=12 * ranks), **call).rows_per_expert_e]
    )


def placing(rank: int, place: Place) -> Step:
    _, _, x = map(place.tensor, drawn(rank))
    sharding = tokens_of_ranks()
    return Step(lambda: [place_tokens(x, sharding=sharding, rank=rank)], (x,))


def exchanging(rank: int, place: Place) -> Step:
    ranks = dist.get_world_size()
    rows = ranks * (ranks - 1) // 2
    x = place.tensor(torch.randn(rows, DIM, generator=torch.Generator().manual_seed(rank)).requires_grad_())
    return Step(lambda: [exchange_rows(x, range(ranks), (rank,) * ranks, world())], (x,))


def agreeing(rank: int, place: Place) -> Step:
    def forward() -> Sequence[Tensor]:
        agree("the same", device=place.device, group=world())
        return []

    return Step(forward)


def asking(rank: int, place: Place) -> Step:
    def forward() -> Sequence[Tensor]:
        sharding = gather_sharding(rank, device=place.device, group=world())
        assert sharding.local_sizes == tuple(range(dist.get_world_size()))
        return []

    return Step(forward)


OF_GROUPS = (
    Operation(name="gather_tokens", step=gathering),
    Operation(name="gather_tokens, even shards", step=gathering_evenly),
    Operation(name="plan_static, even shards", step=planning_evenly),
    Operation(name="place_tokens", step=placing),
    Operation(name="exchange_rows", step=exchanging),
    Operation(name="agree", step=agreeing, d2h=(1, 0)),
    Operation(name="gather_sharding", step=asking, d2h=(1, 0)),
)
