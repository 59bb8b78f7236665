"""One rank's mistake is everyone's error: the same text on every rank, naming the rank, and the ranks work on.

What every rank can see is refused before any collective.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

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
from moe_dispatch.plan.counted import refuse_plan
from moe_dispatch.testing import RankPool

RANKS = 3
SECONDS = 5.0  # measured 10 ms; a wait for a peer that left would be the time-out of the case


@dataclass(frozen=True)
class Call:
    """What one rank passes to ``plan_dispatch``."""

    ids: Any
    weight: Any
    dim: Any
    sharding: TokenSharding
    experts: Partition

    def plan(self) -> DispatchMetadata:
        world = dist.group.WORLD
        assert world is not None
        return plan_dispatch(
            self.ids, dim=self.dim, sharding=self.sharding, experts=self.experts, group=world, weight_BlK=self.weight
        )


Mistake = Callable[[Call], Call]


def good_call(rank: int) -> Call:
    """B = 2, L = 6 cut (3, 0, 3); six experts; K = 2."""
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 3)))
    shape = (*sharding.local_shape(rank), 2)
    ids_BlK = torch.arange(shape[0] * shape[1] * 2).view(shape) % 6
    return Call(ids_BlK, torch.full(shape, 0.5), 4, sharding, Partition((2, 2, 2)))


# ---- mistakes: one rank makes them -------------------------------------------------------------------------


def with_value(tensor: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


def id_too_big(call: Call) -> Call:
    return replace(call, ids=with_value(call.ids, (1, 2, 1), 6))


def id_below_minus_one(call: Call) -> Call:
    return replace(call, ids=with_value(call.ids, (0, 1, 0), -2))


def id_far_out(call: Call) -> Call:
    return replace(call, ids=with_value(call.ids, (0, 0, 1), 2**40 + 1))


def float_ids(call: Call) -> Call:
    return replace(call, ids=call.ids.float())


def int32_ids(call: Call) -> Call:
    return replace(call, ids=call.ids.int())


def short_ids(call: Call) -> Call:
    return replace(call, ids=call.ids[:, :-1])


def flat_ids(call: Call) -> Call:
    return replace(call, ids=call.ids.flatten(0, 1))


def nan_weight(call: Call) -> Call:
    return replace(call, weight=with_value(call.weight, (1, 0, 1), torch.nan))


def short_weights(call: Call) -> Call:
    return replace(call, weight=call.weight[..., :1])


def int_weights(call: Call) -> Call:
    return replace(call, weight=call.weight.long())


def another_dim(call: Call) -> Call:
    return replace(call, dim=5)


def another_partition(call: Call) -> Call:
    return replace(call, experts=Partition((1, 3, 2)))


def another_order(call: Call) -> Call:
    """(2, 3) tokens are (3, 2) in the other order; so many either way."""
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 3)), order="LB")
    return replace(call, sharding=sharding, ids=call.ids.transpose(0, 1), weight=None)


def another_grid(call: Call) -> Call:
    """Six tokens each on ranks 0 and 2, but the batch is cut, not the sequence."""
    sharding = TokenSharding(batch=Partition((2, 0, 2)), seq=3)
    return replace(call, sharding=sharding)


def another_selection(call: Call) -> Call:
    """The same sizes, of other rectangles of the same grid."""
    return replace(call, sharding=TokenSharding(batch=2, seq=Partition((3, 0, 3))).select([2, 1, 0]))


def one_choice_more(call: Call) -> Call:
    return replace(call, ids=torch.cat([call.ids, call.ids[..., :1]], dim=-1), weight=None)


def one_choice_less(call: Call) -> Call:
    return replace(call, ids=call.ids[..., :1], weight=None)


def squeezed_ids(call: Call) -> Call:
    return replace(call, ids=call.ids[..., 0])


def no_choices(call: Call) -> Call:
    return replace(call, ids=call.ids[..., :0], weight=None)


def list_of_ids(call: Call) -> Call:
    return replace(call, ids=call.ids.tolist())


def list_of_weights(call: Call) -> Call:
    return replace(call, weight=call.weight.tolist())


# ---- cases: what the ranks run -----------------------------------------------------------------------------


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "accepted"


def works(rank: int) -> bool:
    """Whether the ranks plan, dispatch and combine as if nothing had been."""
    call = good_call(rank)
    plan = call.plan()
    x_MD, weight_M = dispatch(torch.full(plan.local_shape, 2.0), call.weight, plan)
    return combine(x_MD, plan, weight_M).equal(torch.full(plan.local_shape, 2.0))


def plan_with_mistake(rank: int, mistake: Mistake, culprits: list[int]) -> tuple[str, bool, bool]:
    """The error's text, whether it came soon, and whether the ranks work afterwards."""
    call = good_call(rank)
    call = mistake(call) if rank in culprits else call
    start = time.monotonic()
    text = refusal(call.plan)
    return text, time.monotonic() - start < SECONDS, works(rank)


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
    world: Any = dist.group.WORLD
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 3)))
    x_BlD, swapped_BlD = torch.zeros(*sharding.local_shape(rank), 4), torch.zeros(3, 2, 4)
    pair = TokenSharding(batch=2, seq=Partition((3, 3)))
    partial = TokenSharding(batch=2, seq=Partition((3, 1, 0, 3))).select([0, 2, 3])
    return {
        "place a wrong shape": lambda: place_tokens(swapped_BlD, sharding=sharding, rank=2),
        "place for no rank": lambda: place_tokens(x_BlD, sharding=sharding, rank=3),
        "gather a wrong shape": lambda: gather_tokens(swapped_BlD, sharding=sharding, group=world),
        "gather for two": lambda: gather_tokens(x_BlD, sharding=pair, group=world),
        "gather in no group": lambda: gather_tokens(x_BlD, sharding=sharding, group=None),  # type: ignore[arg-type]
        "gather a selection": lambda: gather_tokens(x_BlD, sharding=partial, group=world),
    }


def refuse_instead(rank: int) -> tuple[str, bool]:
    """Rank 1 cannot even make ids, and says so while the others plan."""
    call, world = good_call(rank), dist.group.WORLD
    assert world is not None

    def refuse() -> None:
        refuse_plan(
            "the router has no weights",
            num_choices=2,
            device=torch.device("cpu"),
            dim=call.dim,
            sharding=call.sharding,
            experts=call.experts,
            group=world,
        )

    return refusal(refuse if rank == 1 else call.plan), works(rank)


def plan_with_strange_weights(rank: int) -> list[bool]:
    """Infinity and numbers that mean nothing are weights; of these only NaN is refused."""
    call = good_call(rank)
    weights = [torch.full_like(call.weight, value) for value in (torch.inf, -torch.inf, 0.0, -1.0, 1e38)]
    return [replace(call, weight=weight).plan() == call.plan() for weight in weights]


# ---- what the tests ask ------------------------------------------------------------------------------------

ID_RULE = "ids are 0 to 5, or -1 for no expert"
INT64 = "they have to be a torch.int64 tensor, e.g. scores.topk(K).indices"
SHAPE = "its shard in order 'BL' is (2, 3), so they have to be (2, 3, 'K') with K >= 1"
ONE_WEIGHT = "each choice needs one floating-point weight"

OF_ONE_RANK: list[tuple[Mistake, str]] = [
    (id_too_big, f"expert id 6 at local token 5, choice 1; {ID_RULE}"),
    (id_below_minus_one, f"expert id -2 at local token 1, choice 0; {ID_RULE}"),
    (id_far_out, f"expert id 1099511627777 at local token 0, choice 1; {ID_RULE}"),
    (float_ids, f"expert ids are torch.float32; {INT64}"),
    (int32_ids, f"expert ids are torch.int32; {INT64}"),
    (short_ids, f"expert ids of shape (2, 2, 2); {SHAPE}"),
    (flat_ids, f"expert ids of shape (6, 2); {SHAPE}"),
    (nan_weight, "the weight at local token 3, choice 1 is NaN; look for NaN or Inf in the router's input"),
    (
        short_weights,
        f"weights of shape (2, 3, 1) and dtype torch.float32 for ids of shape (2, 3, 2); {ONE_WEIGHT}",
    ),
    (int_weights, f"weights of shape (2, 3, 2) and dtype torch.int64 for ids of shape (2, 3, 2); {ONE_WEIGHT}"),
]


@pytest.mark.parametrize(("mistake", "text"), OF_ONE_RANK, ids=[mistake.__name__ for mistake, _ in OF_ONE_RANK])
def test_a_mistake_of_one_rank_is_the_same_error_on_every_rank(
    rank_pool: RankPool, mistake: Mistake, text: str
) -> None:
    for culprit in (0, 2):
        said = rank_pool.run(plan_with_mistake, RANKS, mistake, [culprit])
        assert said == [(f"rank {culprit}: {text}", True, True)] * RANKS


def test_mistakes_of_two_ranks_are_both_told(rank_pool: RankPool) -> None:
    text = f"expert id 6 at local token 5, choice 1; {ID_RULE}"
    said = rank_pool.run(plan_with_mistake, RANKS, id_too_big, [0, 2])
    assert said == [(f"rank 0: {text}; rank 2: {text}", True, True)] * RANKS


def test_a_group_of_one_makes_the_same_errors(rank_pool: RankPool) -> None:
    assert rank_pool.run(refusals_alone, 1) == [
        [
            "rank 0: expert id 2 at local token 1, choice 0; ids are 0 to 1, or -1 for no expert",
            f"rank 0: expert ids are torch.float32; {INT64}",
        ]
    ]


def refusals_alone() -> list[str]:
    world: Any = dist.group.WORLD
    sharding, experts = TokenSharding(batch=1, seq=2), Partition((2,))
    ids_BlK = torch.tensor([[[0], [2]]])
    return [
        refusal(lambda ids=ids: plan_dispatch(ids, dim=1, sharding=sharding, experts=experts, group=world))
        for ids in (ids_BlK, ids_BlK.float())
    ]


FACTS = "K = 2, dim = 4, experts = (2, 2, 2), {}"
GRID = "TokenSharding(batch=Partition(sizes=(2,)), seq=Partition(sizes=(3, 0, 3)), order='{}', rectangles={})"
BELIEVED = FACTS.format(GRID.format("BL", (0, 1, 2)))
OTHER_FACTS: list[tuple[Mistake, str]] = [
    (another_dim, BELIEVED.replace("dim = 4", "dim = 5")),
    (another_partition, BELIEVED.replace("experts = (2, 2, 2)", "experts = (1, 3, 2)")),
    (another_order, FACTS.format(GRID.format("LB", (0, 1, 2)))),
    (another_selection, FACTS.format(GRID.format("BL", (2, 1, 0)))),
    (
        another_grid,
        FACTS.format(
            "TokenSharding(batch=Partition(sizes=(2, 0, 2)), seq=Partition(sizes=(3,)), order='BL', "
            "rectangles=(0, 1, 2))"
        ),
    ),
]


@pytest.mark.parametrize(("mistake", "facts"), OTHER_FACTS, ids=[mistake.__name__ for mistake, _ in OTHER_FACTS])
def test_ranks_that_disagree_are_told_what_each_believes(rank_pool: RankPool, mistake: Mistake, facts: str) -> None:
    text = (
        f"the ranks disagree about one call (ranks [0, 1]: {BELIEVED}; rank [2]: {facts}); every rank of the group "
        "has to pass the same values"
    )
    assert rank_pool.run(plan_with_mistake, RANKS, mistake, [2]) == [(text, True, True)] * RANKS


OF_ANOTHER_LENGTH = [one_choice_more, one_choice_less, squeezed_ids, no_choices, list_of_ids]


@pytest.mark.parametrize("mistake", [*OF_ANOTHER_LENGTH, list_of_weights])
def test_a_mistake_in_how_much_is_sent_is_everyones_error(rank_pool: RankPool, mistake: Mistake) -> None:
    """The rank and its peers do not agree how many bytes the routing takes."""
    said = rank_pool.run(plan_with_mistake, RANKS, mistake, [2])
    texts = {text for text, _, _ in said}
    assert len(texts) == 1
    assert "rank 2" in texts.pop().replace("[2]", "2")
    assert [rest for _, *rest in said] == [[True, True]] * RANKS


def test_a_caller_that_cannot_plan_says_why_to_its_peers(rank_pool: RankPool) -> None:
    assert rank_pool.run(refuse_instead, RANKS) == [("rank 1: the router has no weights", True)] * RANKS


def test_only_nan_is_no_weight(rank_pool: RankPool) -> None:
    assert rank_pool.run(plan_with_strange_weights, RANKS) == [[True] * 5] * RANKS


EQUAL = (
    "they have to be equal, one piece per rank in the group's rank order (for a group that is part of a mesh: "
    "sharding.select(ranks))"
)
NO_GROUP = (
    "group is None; pass the process group explicitly, e.g. torch.distributed.group.WORLD once init_process_group "
    "has run, or device_mesh.get_group()"
)
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
