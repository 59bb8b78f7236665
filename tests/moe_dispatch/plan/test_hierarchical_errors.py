"""A mistake in a plan between nodes is the same error on every rank of every node, naming the column of ranks."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_dispatch import (
    HierarchicalPlan,
    NodeGroups,
    Partition,
    TokenSharding,
    plan_hierarchical,
)
from moe_dispatch.testing import RankPool
from tests.support.dispatch.plans import node_groups
from tests.support.ranks import refusal

EXCHANGE = "all_to_all_single"


Arguments = dict[str, Any]
Mistake = Callable[[Arguments], Arguments]


def good(rank: int, nodes: NodeGroups) -> Arguments:
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 3, 0)))
    shape = (*sharding.local_shape(rank), 2)
    ids_BlK = torch.arange(shape[0] * shape[1] * 2).view(shape) % 6
    given = {"expert_BlK": ids_BlK, "weight_BlK": torch.full(shape, 0.5), "dim": 4, "dtype": torch.float32}
    return given | {"sharding": sharding, "experts": Partition((2, 2, 1, 1)), "nodes": nodes}


def id_too_big(given: Arguments) -> Arguments:
    ids_BlK = given["expert_BlK"].clone()
    ids_BlK[1, 2, 1] = 6
    return given | {"expert_BlK": ids_BlK}


def nan_weight(given: Arguments) -> Arguments:
    weight_BlK = given["weight_BlK"].clone()
    weight_BlK[1, 0, 1] = torch.nan
    return given | {"weight_BlK": weight_BlK}


def another_dim(given: Arguments) -> Arguments:
    return given | {"dim": 5}


def another_dtype(given: Arguments) -> Arguments:
    return given | {"dtype": torch.bfloat16}


def other_experts_elsewhere(given: Arguments) -> Arguments:
    return given | {"experts": Partition((3, 1, 1, 1))}


def another_grid(given: Arguments) -> Arguments:
    return given | {"sharding": TokenSharding(batch=Partition((2, 0, 2, 0)), seq=3)}


def list_of_ids(given: Arguments) -> Arguments:
    return given | {"expert_BlK": given["expert_BlK"].tolist()}


def plan(given: Arguments) -> HierarchicalPlan:
    return plan_hierarchical(**given)


def plan_with_mistake(rank: int, mistake: Mistake, culprits: list[int]) -> str:
    """The text of the refusal. A call without a mistake after it is not refused."""
    with node_groups(rank, 2, 2) as nodes:
        given = mistake(good(rank, nodes)) if rank in culprits else good(rank, nodes)
        text = refusal(lambda: plan(given))
        plan(good(rank, nodes))
        return text


@pytest.mark.parametrize(
    ("mistake", "culprits", "told"),
    [
        (id_too_big, [2], "rank 0: between nodes, where rank i is rank 0 + 2 i of all: rank 1: expert id 6 at local"),
        (nan_weight, [0], "rank 0: between nodes, where rank i is rank 0 + 2 i of all: rank 0: the weight at local"),
        (list_of_ids, [3], "rank 1: between nodes, where rank i is rank 1 + 2 i of all: rank 1: expert ids are <cl"),
        (another_dim, [1], "rank 1: between nodes, where rank i is rank 1 + 2 i of all: the ranks disagree about on"),
        (another_dim, [2, 3], "rank 0: between nodes"),
        (another_dim, [1, 3], "the ranks disagree about one call (rank [0]: torch.float32, K = 2, dim = 4"),
        (another_dtype, [0, 2], "the ranks disagree about one call (rank [0]: torch.bfloat16"),
        (other_experts_elsewhere, [1, 3], "the ranks disagree about one call (rank [0]"),
        (other_experts_elsewhere, [1], "rank 1: between nodes"),
        (another_grid, [0, 2], "the ranks disagree about one call (rank [0]"),
    ],
)
def test_one_error_on_every_rank_of_every_node(
    rank_pool: RankPool, mistake: Mistake, culprits: list[int], told: str
) -> None:
    texts = rank_pool.run(plan_with_mistake, 4, mistake, culprits)
    assert len(set(texts)) == 1
    assert texts[0].startswith(told)


def test_mistakes_in_two_columns_are_both_told(rank_pool: RankPool) -> None:
    text, *_ = rank_pool.run(plan_with_mistake, 4, list_of_ids, [0, 3])
    assert text.count("expert ids are <class 'list'>") == 2


def refused_before_any_collective(rank: int) -> list[str]:
    refuse = AssertionError("a collective was called")
    with node_groups(rank, 2, 2) as nodes, mock.patch.object(dist, EXCHANGE, side_effect=refuse):
        wrong = (
            {"sharding": TokenSharding(batch=2, seq=Partition((3, 3)))},
            {"experts": Partition((6,))},
        )
        return [
            *(refusal(lambda change=change: plan(good(rank, nodes) | change)) for change in wrong),
            refusal(lambda: NodeGroups(inter=nodes.intra, intra=nodes.inter)),
            refusal(lambda: NodeGroups(inter=nodes.inter, intra=None)),  # type: ignore[arg-type]
        ]


def test_what_every_rank_can_see_is_refused_before_any_collective(rank_pool: RankPool) -> None:
    for sharding, experts, numbering, group in rank_pool.run(refused_before_any_collective, 4):
        assert sharding == (
            "the token sharding describes 2 ranks, but there are 2 nodes of 2 ranks; it needs one piece per rank"
        )
        assert experts.startswith("the partition of experts describes 1 ranks")
        assert "ranks have to be numbered node after node" in numbering
        assert group.startswith("group is None; pass the process group explicitly")
