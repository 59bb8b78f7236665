"""MoE with each kind of plan: the same layer, recomputed by the plan of its forward, one error on every rank.

4 ranks; the hierarchical plan takes them as 2 nodes of 2.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_dispatch import (
    DisagreementError,
    GroupError,
    MoE,
    NodeGroups,
    Partition,
    RankMistakeError,
    StaticSizes,
    StaticSizesError,
)
from moe_dispatch.rows import row_exchange
from moe_dispatch.testing import RankPool
from moe_dispatch.testing.counting import counting, run_backward
from tests.support.dispatch.checkpoints import Run, plainly, recomputed
from tests.support.dispatch.moe import Case, Outcome, assert_like_one_process, outcome, pull
from tests.support.dispatch.plans import KINDS, Kind, node_groups, planner_of
from tests.support.ranks import refusal, world

pytestmark = pytest.mark.usefixtures("uncovered")

CASES = [
    Case(seq=(3, 1, 0, 2), experts=(2, 2, 2, 2), groups=4, limited_groups=2, top_k=3),
    Case(seq=(3, 2), batch=(2, 1), experts=(3, 0, 2, 1), order="LB"),
    Case(seq=(1, 1, 1, 0), experts=(0, 0, 4, 1), batch=(1,), top_k=4, shared=False, score="softmax"),
]


def run_planned(rank: int, case: Case, kind: Kind, run: Run) -> tuple[Outcome, int]:
    """Forward and backward of this rank's part, and how often its tokens were routed."""
    x_BlD, pull_BlD, pull_BlE = case.shards(rank)
    with planner_of(kind, rank, case.sizes) as planner:
        moe = case.layer(rank, planner=planner)
        with mock.patch.object(moe.router, "choose", wraps=moe.router.choose) as choose:
            results = run(moe, x_BlD, case.sharding)
            pull(results, pull_BlD, pull_BlE).backward()
        moe.check()
        return outcome(moe, x_BlD, results), choose.call_count


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("run", [plainly, recomputed])
@pytest.mark.parametrize("kind", [*KINDS, "by counts"])
def test_every_kind_of_plan_equals_one_process_and_routes_once(
    rank_pool: RankPool, kind: Kind, run: Run, case: Case
) -> None:
    outcomes, routed = zip(*rank_pool.run(run_planned, 4, case, kind, run), strict=True)
    assert_like_one_process(case, outcomes)
    assert set(routed) == {1}


def host_syncs(rank: int, case: Case, kind: Kind) -> tuple[int, int, int]:
    """Where the host would wait for a device: in forward, in backward; and the collectives of both."""
    x_BlD, pull_BlD, _ = case.shards(rank)
    with planner_of(kind, rank, case.sizes) as planner:
        moe = case.layer(rank, planner=planner)
        moe(x_BlD, sharding=case.sharding)  # the sharding keeps what is made once
        with counting() as forward:
            y_BlD, _ = moe(x_BlD, sharding=case.sharding)
        with counting() as backward:
            run_backward(y_BlD, pull_BlD)
    return len(forward.host_syncs), len(backward.host_syncs), len(forward.collectives) + len(backward.collectives)


@pytest.mark.parametrize(
    ("kind", "counts"),
    [("counted", (1, 0, 5)), ("by counts", (1, 0, 5)), ("static", (0, 0, 5)), ("hierarchical", (2, 0, 10))],
)
def test_host_syncs_and_collectives_of_a_layer(rank_pool: RankPool, kind: Kind, counts: tuple[int, int, int]) -> None:
    case = replace(CASES[0], dtype=torch.float32)  # widths of 16 bytes: experts wait for nothing
    assert rank_pool.run(host_syncs, 4, case, kind) == [counts] * 4


class Noted(torch.nn.Module):
    """Shared experts that say when they run."""

    def __init__(self, shared: torch.nn.Module, events: list[str]) -> None:
        super().__init__()
        self.shared, self.events = shared, events

    def forward(self, x_BlD: Tensor) -> Tensor:
        self.events.append("shared")
        return self.shared(x_BlD)


def events_of_a_layer(rank: int, case: Case, kind: Kind) -> list[str]:
    """What happens in forward, up to the first rows that arrive."""
    events: list[str] = []
    start, wait = row_exchange.start_exchange_into, row_exchange.RowExchange.wait

    def noted_start(*args: Any) -> Any:
        events.append("start")
        return start(*args)

    def noted_wait(exchange: row_exchange.RowExchange) -> Tensor:
        events.append("wait")
        return wait(exchange)

    with planner_of(kind, rank, case.sizes) as planner:
        moe = case.layer(rank, planner=planner)
        assert moe.shared is not None
        moe.shared = Noted(moe.shared, events)
        with (
            mock.patch.object(row_exchange, "start_exchange_into", noted_start),
            mock.patch.object(row_exchange.RowExchange, "wait", noted_wait),
        ):
            moe(case.shards(rank)[0], sharding=case.sharding)
    return events[:3]


@pytest.mark.parametrize("kind", KINDS)
def test_shared_experts_run_while_rows_are_on_their_way(rank_pool: RankPool, kind: Kind) -> None:
    assert rank_pool.run(events_of_a_layer, 4, CASES[0], kind) == [["start", "shared", "wait"]] * 4


def tokens_of_another_shape(rank: int, case: Case, kind: Kind) -> tuple[str, tuple[int, ...]]:
    """Rank 2 passes a token too many. What each rank is told, and whom it blames; then a good call."""
    x_BlD = case.shards(rank)[0]
    with planner_of(kind, rank, case.sizes) as planner:
        moe = case.layer(rank, planner=planner)
        with pytest.raises(RankMistakeError) as raised:
            moe(
                torch.cat([x_BlD, x_BlD.new_zeros(2, 1, x_BlD.shape[2])], 1) if rank == 2 else x_BlD,
                sharding=case.sharding,
            )
        moe(x_BlD, sharding=case.sharding)
    return str(raised.value), raised.value.ranks


@pytest.mark.parametrize(
    ("kind", "ranks"), [("counted", [(2,)] * 4), ("static", [(2,)] * 4), ("hierarchical", [(0,), (0,), (0,), (0,)])]
)
def test_wrong_tokens_of_one_rank_are_everyones_error(
    rank_pool: RankPool, kind: Kind, ranks: list[tuple[int, ...]]
) -> None:
    """A hierarchical plan names the rank in its node, 0 of each, and in the text that of its column."""
    texts, found = zip(*rank_pool.run(tokens_of_another_shape, 4, CASES[0], kind), strict=True)
    assert len(set(texts)) == 1
    assert "x is (2, 1, 8) of torch.float64; its shard in order 'BL' is (2, 0, 8)" in texts[0]
    assert list(found) == ranks
    if kind == "hierarchical":
        assert texts[0].count("between nodes, where rank i is rank 0 + 2 i of all: rank 1: x is (2, 1, 8)") == 2 - 1
    else:
        assert texts[0].startswith("rank 2: ")


def gradient_on_one_rank(rank: int, case: Case, kind: Kind) -> tuple[str, bool]:
    """Only rank 1 freezes its router and tokens, so it would take no part in backward for them."""
    x_BlD = case.shards(rank)[0]
    with planner_of(kind, rank, case.sizes) as planner:
        moe = case.layer(rank, planner=planner)
        if rank == 1:
            moe.router.requires_grad_(False)
            x_BlD = x_BlD.detach()
        try:
            y_BlD, _ = moe(x_BlD, sharding=case.sharding)
            assert y_BlD.isnan().all()
            moe.check()
        except GroupError as error:
            return str(error), isinstance(error, DisagreementError | RankMistakeError | StaticSizesError)
    return "", False


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_agree_about_what_needs_a_gradient(rank_pool: RankPool, kind: Kind) -> None:
    told = rank_pool.run(gradient_on_one_rank, 4, CASES[0], kind)
    assert len(set(told)) == 1
    assert "disagree" in told[0][0]
    assert told[0][1]


def check_after(rank: int, case: Case, rows: list[int]) -> tuple[list[bool], str]:
    """Calls with so many rows per rank, in turn, in one layer: which outputs are NaN, and what ``check`` says of the
    sizes of the first. Then it says nothing, also after a call that is good."""
    x_BlD = case.shards(rank)[0]
    enough = StaticSizes(rows_per_pair=max(case.sharding.local_sizes), rows=rows[0])
    moe = case.layer(rank, planner=enough)
    nan = []
    for number in rows:
        moe.planner = replace(enough, rows=number)
        nan.append(bool(moe(x_BlD, sharding=case.sharding)[0].isnan().any()))
    moe.planner = enough
    text = refusal(moe.check)
    moe.check()
    moe.planner = replace(enough, rows=case.sharding.num_tokens * case.top_k)
    moe(x_BlD, sharding=case.sharding)
    moe.check()
    assert not {"report", "load_E"} & moe.state_dict().keys()
    return nan, text


def test_check_tells_of_any_call_since_the_last(rank_pool: RankPool) -> None:
    case = replace(CASES[0], experts=(8, 0, 0, 0))
    needed = case.sharding.num_tokens * case.top_k
    for rank, (nan, text) in enumerate(rank_pool.run(check_after, 4, case, [needed - 1, needed - 4])):
        assert nan == [rank != 2] * 2  # rank 2 has no tokens
        assert f"{needed} choices fall on the experts of one rank, but rows is {needed - 1}; plan with more" in text


def copy_and_refuse(rank: int, case: Case) -> tuple[bool, str, str]:
    """A deep copy plans over the same nodes; nodes that are not the group's are refused."""
    x_BlD = case.shards(rank)[0].detach()
    with node_groups(rank, 2, 2) as nodes:
        moe = case.layer(rank, planner=nodes)
        copied: MoE = deepcopy(moe)
        same = torch.equal(copied(x_BlD, sharding=case.sharding)[0], moe(x_BlD, sharding=case.sharding)[0])
        of_node = replace(case, experts=case.experts[:2], groups=1, limited_groups=1)
        in_node = refusal(lambda: of_node.layer(nodes.intra.rank(), group=nodes.intra, planner=nodes))
        turned = mock.Mock(spec=NodeGroups, num_ranks=4, rank=(rank + 1) % 4)
        other_order = refusal(lambda: NodeGroups.check_group(turned, Partition(case.experts), world()))
    return same, in_node, other_order


def test_a_copy_stays_in_its_nodes_and_other_nodes_are_refused(rank_pool: RankPool) -> None:
    for rank, (same, in_node, other_order) in enumerate(rank_pool.run(copy_and_refuse, 4, CASES[0])):
        assert same
        assert in_node.startswith("the nodes of a hierarchical plan describes 4 ranks, but the group has 2")
        assert other_order.startswith(f"rank {rank} of the group is rank {(rank + 1) % 4} of the nodes")
