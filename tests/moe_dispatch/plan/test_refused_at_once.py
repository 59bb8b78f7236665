"""What every rank can see is refused before any collective, and the ranks work on."""

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist

from moe_dispatch import (
    DispatchMetadata,
    Partition,
    TokenSharding,
    combine,
    dispatch,
    gather_tokens,
    place_tokens,
    plan_dispatch,
)
from moe_dispatch.testing import RankPool
from tests.support.dispatch.plan_calls import EQUAL, NO_GROUP, ONE_WEIGHT, RANKS, good_call, works
from tests.support.ranks import refusal, world


def refused_alone(rank: int, calls: Callable[[int], dict[str, Callable[[], object]]]) -> dict[str, str]:
    """The text of each refusal, none of which may come from behind a collective."""
    made, refuse = calls(rank), AssertionError("a collective was called")
    with mock.patch.object(dist, "all_to_all_single", side_effect=refuse):
        texts = {name: refusal(call) for name, call in made.items()}
    assert works(rank)
    return texts


def wrong_for_all(rank: int) -> dict[str, Callable[[], object]]:
    call = good_call(rank)
    return {
        "two shards": replace(call, sharding=TokenSharding(batch=2, seq=Partition((3, 3)))).plan,
        "two pieces of experts": replace(call, experts=Partition((3, 3))).plan,
        "no group": lambda: plan_dispatch(
            call.ids,
            dim=4,
            sharding=call.sharding,
            experts=call.experts,
            group=None,  # type: ignore[arg-type]
        ),
        "dim 0": replace(call, dim=0).plan,
        "dim 4.0": replace(call, dim=4.0).plan,
        "no experts": replace(call, experts=Partition((0, 0, 0))).plan,
        "too many experts": replace(call, experts=Partition((32766, 0, 1))).plan,
    }


def plan_alone(rank: int) -> DispatchMetadata:
    """The plan of three tokens in a group of one, so that dispatch and combine can be called alone."""
    groups = [dist.new_group([other]) for other in range(dist.get_world_size())]
    group = groups[rank]
    assert isinstance(group, dist.ProcessGroup)
    sharding = TokenSharding(batch=1, seq=3)
    ids_BlK = torch.zeros(1, 3, 2, dtype=torch.int64)
    return plan_dispatch(ids_BlK, dim=4, sharding=sharding, experts=Partition((2,)), group=group)


def wrong_rows(rank: int) -> dict[str, Callable[[], object]]:
    plan = plan_alone(rank)
    x_BlD, weight_BlK, y_MD = torch.zeros(1, 3, 4), torch.zeros(1, 3, 2), torch.zeros(6, 4)
    return {
        "x too short": lambda: dispatch(x_BlD[:, :2], weight_BlK, plan),
        "x too narrow": lambda: dispatch(x_BlD[..., :3], weight_BlK, plan),
        "x flat": lambda: dispatch(x_BlD.flatten(0, 1), weight_BlK, plan),
        "x of ints": lambda: dispatch(x_BlD.long(), weight_BlK, plan),
        "weights of one choice": lambda: dispatch(x_BlD, weight_BlK[..., :1], plan),
        "weights of ints": lambda: dispatch(x_BlD, weight_BlK.int(), plan),
        "y too short": lambda: combine(y_MD[:5], plan),
        "y of one dimension": lambda: combine(y_MD[:, 0], plan),
        "y of ints": lambda: combine(y_MD.long(), plan),
        "weight_M too short": lambda: combine(y_MD, plan, torch.zeros(5)),
        "weight_M of two dimensions": lambda: combine(y_MD, plan, torch.zeros(6, 1)),
    }


def wrong_places(rank: int) -> dict[str, Callable[[], object]]:
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 3)))
    x_BlD, swapped_BlD = torch.zeros(*sharding.local_shape(rank), 4), torch.zeros(3, 2, 4)
    pair = TokenSharding(batch=2, seq=Partition((3, 3)))
    partial = TokenSharding(batch=2, seq=Partition((3, 1, 0, 3))).select([0, 2, 3])
    return {
        "place a wrong shape": lambda: place_tokens(swapped_BlD, sharding=sharding, rank=2),
        "place for no rank": lambda: place_tokens(x_BlD, sharding=sharding, rank=3),
        "gather a wrong shape": lambda: gather_tokens(swapped_BlD, sharding=sharding, group=world()),
        "gather for two": lambda: gather_tokens(x_BlD, sharding=pair, group=world()),
        "gather in no group": lambda: gather_tokens(x_BlD, sharding=sharding, group=None),  # type: ignore[arg-type]
        "gather a selection": lambda: gather_tokens(x_BlD, sharding=partial, group=world()),
    }


DIM = "it is the width of the rows to move, an int of at least 1, e.g. x_BlD.shape[-1]"


def test_what_every_rank_can_see_is_refused_before_any_collective(rank_pool: RankPool) -> None:
    texts = {
        "two shards": f"the token sharding describes 2 ranks, but the group has 3; {EQUAL}",
        "two pieces of experts": f"the partition of experts describes 2 ranks, but the group has 3; {EQUAL}",
        "no group": NO_GROUP,
        "dim 0": f"dim is 0; {DIM}",
        "dim 4.0": f"dim is 4.0; {DIM}",
        "no experts": "0 experts; a group can have 1 to 32766",
        "too many experts": "32767 experts; a group can have 1 to 32766",
    }
    assert rank_pool.run(refused_alone, RANKS, wrong_for_all) == [texts] * RANKS


def test_rows_that_do_not_fit_the_plan_are_refused(rank_pool: RankPool) -> None:
    plan = "but the plan was made for (1, 3, 4); pass the floating-point tokens that the plan's expert ids belong to"
    ids = f"but the plan was made from ids of shape (1, 3, 2); {ONE_WEIGHT}"
    rows = "but the plan has 6 rows; pass one floating-point row per row of dispatch, in its order"
    weights = "but the plan has 6 rows; pass the weight_M of dispatch"
    texts = {
        "x too short": f"rank 0: x is (1, 2, 4) of torch.float32, {plan}",
        "x too narrow": f"rank 0: x is (1, 3, 3) of torch.float32, {plan}",
        "x flat": f"rank 0: x is (3, 4) of torch.float32, {plan}",
        "x of ints": f"rank 0: x is (1, 3, 4) of torch.int64, {plan}",
        "weights of one choice": f"rank 0: weights are (1, 3, 1) of torch.float32, {ids}",
        "weights of ints": f"rank 0: weights are (1, 3, 2) of torch.int32, {ids}",
        "y too short": f"rank 0: y is (5, 4) of torch.float32, {rows}",
        "y of one dimension": f"rank 0: y is (6,) of torch.float32, {rows}",
        "y of ints": f"rank 0: y is (6, 4) of torch.int64, {rows}",
        "weight_M too short": f"rank 0: weight_M is (5,), {weights}",
        "weight_M of two dimensions": f"rank 0: weight_M is (6, 1), {weights}",
    }
    assert rank_pool.run(refused_alone, RANKS, wrong_rows) == [texts] * RANKS


def test_tokens_that_cannot_be_placed_or_gathered_are_refused(rank_pool: RankPool) -> None:
    def misshapen(rank: int) -> str:
        return (
            f"rank {rank} has a tensor of shape (3, 2, 4), but its shard in order 'BL' is {(2, (3, 0, 3)[rank])}; "
            f"pass this rank's tokens, as sharding.shard(x, {rank}) cuts them"
        )

    texts = {
        "place a wrong shape": misshapen(2),
        "place for no rank": "rank 3 of a sharding over 3 ranks; it has to be 0 to 2",
        "gather for two": f"the token sharding describes 2 ranks, but the group has 3; {EQUAL}",
        "gather in no group": NO_GROUP,
        "gather a selection": "gather_tokens needs every token of the grid, but the ranks of this sharding hold "
        "12 of 14; describe the tokens that this group holds, not a selection of a larger mesh",
    }
    said = rank_pool.run(refused_alone, RANKS, wrong_places)
    assert said == [texts | {"gather a wrong shape": misshapen(rank)} for rank in range(RANKS)]
