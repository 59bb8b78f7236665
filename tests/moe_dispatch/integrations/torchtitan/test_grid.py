"""The grid of the tokens that torchtitan gives the ranks, in the order of its load balancer."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchtitan.distributed import parallel_dims
from torchtitan.distributed.context_parallel import cp_shard
from torchtitan.distributed.parallel_dims import ParallelDims

from moe_dispatch.integrations.torchtitan import even_sharding
from moe_dispatch.testing import RankThreads
from tests.support.ranks import refusal


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_dims, "device_type", "cpu")


def built(sizes: dict[str, int]) -> ParallelDims:
    ones: dict[str, Any] = dict.fromkeys(("dp_replicate", "cp", "tp", "pp"), 1)
    dims = ParallelDims(**{**ones, **sizes}, world_size=4)
    dims.build_mesh()
    return dims


def grids(rank: int, sizes: dict[str, int], options: dict[str, Any]) -> list[list[int]]:
    sharding = even_sharding(built(sizes), batch=2, length=4, **options)
    return [sharding.tokens(rank).tolist() for rank in range(sharding.num_ranks)]


CONTIGUOUS: dict[str, Any] = {"load_balancer": None}
FIRST, LAST = [[0, 1, 4, 5], [2, 3, 6, 7]], [[8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(
    ("sizes", "options", "first", "last"),
    [
        # a row is 4 places of the grid; two rows per data-parallel rank
        ({"dp_shard": 2, "cp": 2, "ep": 2}, CONTIGUOUS, FIRST, LAST),
        ({"dp_shard": 2, "tp": 2, "ep": 2}, {"load_balancer": "ptrr"}, FIRST, LAST),  # of cp, which there is not
        ({"dp_shard": 1, "cp": 2, "tp": 2, "ep": 4}, CONTIGUOUS, [[0, 4], [1, 5], [2, 6], [3, 7]], None),
        ({"dp_shard": 2, "dp_replicate": 2, "ep": 2}, {}, [[*range(8)], [*range(8, 16)]], None),
        ({"dp_shard": 1, "cp": 2, "tp": 2, "ep": 4}, {}, [[0, 4], [3, 7], [1, 5], [2, 6]], None),
    ],
)
def test_the_grid_is_as_torchtitan_cuts_it(
    rank_threads: RankThreads,
    sizes: dict[str, int],
    options: dict[str, Any],
    first: list[list[int]],
    last: list[list[int]] | None,
) -> None:
    found = rank_threads.run(grids, 4, sizes, options)
    assert found[0] == first
    assert found[3] == (last or first)


def cut_by_both(rank: int, cp: int, load_balancer: str | None) -> tuple[Tensor, Tensor]:
    """The places of this rank's tokens, by torchtitan and by the grid."""
    dims, length = built({"dp_shard": 4 // cp, "cp": cp, "ep": 4}), 24
    place_BL = torch.arange(length).repeat(2, 1)
    (theirs_Bl,), _ = cp_shard(dims.get_mesh("cp"), (place_BL,), None, load_balancer)
    sharding = even_sharding(dims, batch=2, length=length, load_balancer=load_balancer)
    return theirs_Bl, sharding.positions(rank).view(sharding.local_shape(rank))


@pytest.mark.parametrize("load_balancer", ["headtail", None])
@pytest.mark.parametrize("cp", [2, 4])
def test_places_are_those_of_torchtitans_load_balancer(
    rank_threads: RankThreads, cp: int, load_balancer: str | None
) -> None:
    for theirs_Bl, ours_Bl in rank_threads.run(cut_by_both, 4, cp, load_balancer):
        assert torch.equal(ours_Bl, theirs_Bl)


def refused(rank: int) -> list[str]:
    dims = built({"dp_shard": 1, "cp": 2, "tp": 2, "ep": 2})
    return [
        refusal(lambda: even_sharding(built({"dp_shard": 4, "ep": 1}), batch=1, length=4)),
        refusal(lambda: even_sharding(dims, batch=1, length=8, load_balancer="ptrr")),
        refusal(lambda: even_sharding(dims, batch=1, length=6, load_balancer=None)),
        refusal(lambda: even_sharding(built({"dp_shard": 2, "cp": 2, "ep": 2}), batch=1, length=6)),
    ]


def test_what_has_no_grid_is_refused(rank_threads: RankThreads) -> None:
    assert rank_threads.run(refused, 4)[0] == [
        "ep is 1, so no rows travel and no sharding is needed; leave known_tokens out",
        "load_balancer is 'ptrr'; only 'headtail' gives every batch the same order of tokens: pass that or None, in "
        "whose grid every token finds its experts, too",
        "length is 6, with cp = 2 and tp = 2; torchtitan cuts it evenly, so it has to be a multiple of cp * tp = 4",
        "length is 6, with cp = 2 and tp = 1; torchtitan cuts it evenly, so it has to be a multiple of cp * tp = 2, "
        "and for 'headtail' of 2 * cp = 4",
    ]
