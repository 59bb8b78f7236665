"""The operations of ``moe_dispatch`` that know no expert."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import agree, exchange_rows, gather_sharding, gather_tokens, place_tokens
from tests.support.ranks import world

from .of_experts import DIM, drawn, tokens_of_ranks
from .operation import Operation, Place, Step


def gathering(rank: int, place: Place) -> Step:
    _, _, x = map(place.tensor, drawn(rank))
    sharding = tokens_of_ranks()
    return Step(lambda: [gather_tokens(x, sharding=sharding, group=world())], (x,))


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
    Operation(name="place_tokens", step=placing),
    Operation(name="exchange_rows", step=exchanging),
    Operation(name="agree", step=agreeing, d2h=(1, 0)),
    Operation(name="gather_sharding", step=asking, d2h=(1, 0)),
)
