"""One rank's mistake is everyone's error: the same text on every rank, naming the rank, and the ranks work on."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dispatch import (
    Partition,
    TokenSharding,
    plan_dispatch,
)
from moe_dispatch.plan.counted import Counted
from moe_dispatch.plan.terms import Terms
from moe_dispatch.testing import RankPool
from tests.support.dispatch.plan_calls import ONE_WEIGHT, RANKS, Call, Mistake, good_call, works
from tests.support.ranks import refusal, world


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


def int16_ids(call: Call) -> Call:
    return replace(call, ids=call.ids.short())


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


def another_order_of_pieces(call: Call) -> Call:
    return replace(call, sharding=TokenSharding(batch=2, seq=Partition((3, 0, 3)), held=((2,), (1,), (0,))))


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


def plan_with_mistake(rank: int, mistake: Mistake, culprits: list[int]) -> tuple[str, bool]:
    """The error's text, and whether the ranks work afterwards."""
    call = good_call(rank)
    call = mistake(call) if rank in culprits else call
    return refusal(call.plan), works(rank)


def refuse_instead(rank: int) -> tuple[str, bool]:
    """Rank 1 cannot even make ids, and says so while the others plan."""
    call = good_call(rank)

    def refuse() -> None:
        terms = Terms(sharding=call.sharding, experts=call.experts, dim=call.dim)
        Counted().refuse("the router has no weights", terms, world(), num_choices=2, device=torch.device("cpu"))

    return refusal(refuse if rank == 1 else call.plan), works(rank)


def plan_with_strange_weights(rank: int) -> list[bool]:
    """Infinity and numbers that mean nothing are weights; of these only NaN is refused."""
    call = good_call(rank)
    weights = [torch.full_like(call.weight, value) for value in (torch.inf, -torch.inf, 0.0, -1.0, 1e38)]
    return [replace(call, weight=weight).plan() == call.plan() for weight in weights]


ID_RULE = "ids are 0 to 5, or -1 for no expert"
INT64 = "they have to be a torch.int64 or torch.int32 tensor, e.g. scores.topk(K).indices"
SHAPE = "its shard in order 'BL' is (2, 3), so they have to be (2, 3, 'K') with K >= 1"

OF_ONE_RANK: list[tuple[Mistake, str]] = [
    (id_too_big, f"expert id 6 at local token 5, choice 1; {ID_RULE}"),
    (id_below_minus_one, f"expert id -2 at local token 1, choice 0; {ID_RULE}"),
    (id_far_out, f"expert id 1099511627777 at local token 0, choice 1; {ID_RULE}"),
    (float_ids, f"expert ids are torch.float32; {INT64}"),
    (int16_ids, f"expert ids are torch.int16; {INT64}"),
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
        assert said == [(f"rank {culprit}: {text}", True)] * RANKS


def test_mistakes_of_two_ranks_are_both_told(rank_pool: RankPool) -> None:
    text = f"expert id 6 at local token 5, choice 1; {ID_RULE}"
    said = rank_pool.run(plan_with_mistake, RANKS, id_too_big, [0, 2])
    assert said == [(f"rank 0: {text}; rank 2: {text}", True)] * RANKS


def test_a_group_of_one_makes_the_same_errors(rank_pool: RankPool) -> None:
    assert rank_pool.run(refusals_alone, 1) == [
        [
            "rank 0: expert id 2 at local token 1, choice 0; ids are 0 to 1, or -1 for no expert",
            f"rank 0: expert ids are torch.float32; {INT64}",
        ]
    ]


def refusals_alone() -> list[str]:
    sharding, experts = TokenSharding(batch=1, seq=2), Partition((2,))
    ids_BlK = torch.tensor([[[0], [2]]])
    return [
        refusal(lambda ids=ids: plan_dispatch(ids, dim=1, sharding=sharding, experts=experts, group=world()))
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
        another_order_of_pieces,
        FACTS.format(GRID.format("BL", (0, 1, 2))).replace("'BL', ", "'BL', held=((2,), (1,), (0,)), "),
    ),
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
    assert rank_pool.run(plan_with_mistake, RANKS, mistake, [2]) == [(text, True)] * RANKS


OF_ANOTHER_LENGTH = [one_choice_more, one_choice_less, squeezed_ids, no_choices, list_of_ids]


@pytest.mark.parametrize("mistake", [*OF_ANOTHER_LENGTH, list_of_weights])
def test_a_mistake_in_how_much_is_sent_is_everyones_error(rank_pool: RankPool, mistake: Mistake) -> None:
    """The rank and its peers do not agree how many bytes the routing takes."""
    said = rank_pool.run(plan_with_mistake, RANKS, mistake, [2])
    texts = {text for text, _ in said}
    assert len(texts) == 1
    assert "rank 2" in texts.pop().replace("[2]", "2")
    assert [right for _, right in said] == [True] * RANKS


def test_a_caller_that_cannot_plan_says_why_to_its_peers(rank_pool: RankPool) -> None:
    assert rank_pool.run(refuse_instead, RANKS) == [("rank 1: the router has no weights", True)] * RANKS


def test_only_nan_is_no_weight(rank_pool: RankPool) -> None:
    assert rank_pool.run(plan_with_strange_weights, RANKS) == [[True] * 5] * RANKS
