"""What is predicted is what runs: the bytes of every collective, to every rank, forward and backward."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dispatch import (
    Partition,
    TokenSharding,
    combine,
    dispatch,
    plan_dispatch,
    plan_hierarchical,
)
from moe_dispatch.lab.bench.contenders.textbook import TextbookDispatch
from moe_dispatch.lab.forecast import traffic
from moe_dispatch.lab.forecast.demand import Demand, counted_demand
from moe_dispatch.lab.forecast.predict import link_sums
from moe_dispatch.lab.forecast.traffic import Traffic, Widths, row_per_choice, row_per_node, row_per_rank
from moe_dispatch.plan import counted
from moe_dispatch.testing import RankPool
from tests.support.dispatch.dense import make_case
from tests.support.dispatch.layouts import Layout
from tests.support.dispatch.plans import node_groups

Sent = list[list[int]]  # of each collective, bytes to each rank of its group


class Recorder(TorchDispatchMode):
    """Bytes to each rank of every all-to-all."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Sent = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            assert func.name() == "c10d::alltoall_base_"
            rows, splits = args[1], args[4]
            row_bytes = rows.numel() * rows.itemsize // max(len(rows), 1)
            self.sent.append([count * row_bytes for count in splits])
        return func(*args, **kwargs or {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    layout: Layout
    experts: tuple[int, ...]
    num_nodes: int
    expert_BLK: Tensor
    dim: int
    x_dtype: torch.dtype

    @property
    def widths(self) -> Widths:
        itemsize = self.x_dtype.itemsize
        return Widths(dim=self.dim, num_choices=self.expert_BLK.shape[2], row_bytes=itemsize, weight_bytes=4)

    def traffic(self, scheme: Callable[..., Traffic]) -> Traffic:
        ids = [ids_BlK.flatten(0, 1) for ids_BlK in self.layout.cut(self.expert_BLK)]
        return scheme(counted_demand(ids, Partition(self.experts), self.num_nodes), self.widths)


def run_inputs(rank: int, run: Run) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    expert_BlK = run.layout.cut(run.expert_BLK)[rank]
    x_BlD = torch.ones(*expert_BlK.shape[:2], run.dim, dtype=run.x_dtype, requires_grad=True)
    weight_BlK = torch.ones(expert_BlK.shape, requires_grad=True)
    sharding = TokenSharding(batch=Partition(run.layout.batch), seq=Partition(run.layout.seq))
    return expert_BlK, x_BlD, weight_BlK, {"dim": run.dim, "sharding": sharding, "experts": Partition(run.experts)}


def run_flat(rank: int, run: Run) -> Sent:
    expert_BlK, x_BlD, weight_BlK, given = run_inputs(rank, run)
    with Recorder() as recorder:
        plan = plan_dispatch(expert_BlK, group=dist.group.WORLD, **given)  # type: ignore[arg-type]
        x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
        combine(x_MD, plan, weight_M).sum().backward()
    return recorder.sent


def run_by_counts(rank: int, run: Run) -> Sent:
    with mock.patch.object(counted, "counts_cost_less", return_value=True):
        return run_flat(rank, run)


def traffic_by_counts(demand: Demand, widths: Widths) -> Traffic:
    with mock.patch.object(traffic, "counts_cost_less", return_value=True):
        return row_per_rank(demand, widths)


def run_nodes(rank: int, run: Run) -> Sent:
    expert_BlK, x_BlD, weight_BlK, given = run_inputs(rank, run)
    with node_groups(rank, run.num_nodes, len(run.experts) // run.num_nodes) as nodes, Recorder() as recorder:
        plan = plan_hierarchical(expert_BlK, nodes=nodes, **given)
        x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
        combine(x_MD, plan, weight_M).sum().backward()
        return list(recorder.sent)


def run_textbook(rank: int, run: Run) -> Sent:
    expert_BlK, x_BlD, weight_BlK, _ = run_inputs(rank, run)
    layer = TextbookDispatch(SimpleNamespace(experts=Partition(run.experts)), dist.group.WORLD)  # type: ignore[arg-type]
    with Recorder() as recorder:
        y_tD = layer.forward(*(t.flatten(0, 1) for t in (x_BlD, expert_BlK, weight_BlK)))
        y_tD.sum().backward()
    return recorder.sent


def runs(ranks: int, num_nodes: int, routings: tuple[str, ...]) -> list[Run]:
    """Uneven shards of 2 rows, an empty one among them; uneven experts; one and two bytes per id."""
    torch.manual_seed(ranks)
    layout = Layout(batch=(2,), seq={2: (5, 2), 4: (4, 0, 1, 3)}[ranks])
    found = []
    for i, routing in enumerate(routings):
        experts = [{2: (3, 2), 4: (2, 1, 0, 3)}, {2: (150, 120), 4: (100, 0, 20, 180)}][i % 2][ranks]
        case = make_case(layout, routing, experts=experts, num_choices=(3, 6)[i % 2], dim=1, width=1)
        dtype = (torch.float32, torch.bfloat16)[i % 2]
        found.append(
            Run(
                layout=layout,
                experts=experts,
                num_nodes=num_nodes,
                expert_BLK=case.expert_BLK,
                dim=(7, 1030)[i % 2],  # with the weights 40 bytes, and 2084: a row starts every 2096
                x_dtype=dtype,
            )
        )
    return found


def of_rank(legs: tuple[Tensor, ...], rank: int, peers: list[range]) -> Sent:
    """What the legs say a rank sends to the ranks of each collective's group, and that it sends to no others."""
    found = []
    for leg_PP, ranks in zip(legs, peers, strict=True):
        sent = leg_PP[rank].tolist()
        assert sum(sent) == sum(sent[to] for to in ranks)
        found.append([sent[to] for to in ranks])
    return found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("scheme", "function", "routings"),
    [(row_per_rank, run_flat, ("uniform", "holes", "duplicates", "none")),
     (traffic_by_counts, run_by_counts, ("uniform", "holes", "duplicates", "none")),
     (row_per_choice, run_textbook, ("uniform", "one_expert", "duplicates", "one_rank"))],
)  # fmt: skip
def test_one_step_sends_what_is_predicted_to_every_rank(
    rank_pool: RankPool, ranks: int, scheme: Any, function: Any, routings: tuple[str, ...]
) -> None:
    for run in runs(ranks, 1, routings):
        predicted = run.traffic(scheme)
        legs = (*predicted.plan, *predicted.dispatch, *predicted.combine, *predicted.backward)
        for rank, sent in enumerate(rank_pool.run(function, ranks, run)):
            assert sent == of_rank(legs, rank, [range(ranks)] * 5), f"rank {rank} of {run}"


@pytest.mark.parametrize(("num_nodes", "in_node"), [(2, 2), (1, 2), (2, 1), (4, 1)])
def test_two_steps_send_what_is_predicted_to_every_rank(rank_pool: RankPool, num_nodes: int, in_node: int) -> None:
    ranks = num_nodes * in_node
    for run in runs(ranks, num_nodes, ("uniform", "holes", "duplicates", "one_rank")):
        predicted = run.traffic(row_per_node)
        legs = (*predicted.plan, *predicted.dispatch, *predicted.combine, *predicted.backward)
        for rank, sent in enumerate(rank_pool.run(run_nodes, ranks, run)):
            column = range(rank % in_node, ranks, in_node)
            node = range(rank - rank % in_node, rank - rank % in_node + in_node)
            peers = [column, node] * 2 + [node, column] + [column, node] + [node, column]
            wanted = of_rank(legs, rank, peers)
            # A group of one rank communicates nothing.
            assert sent == [to for to, group in zip(wanted, peers, strict=True) if len(group) > 1], f"{rank} of {run}"


def test_what_a_rank_sends_over_each_link() -> None:
    """2 nodes of 2: [0][1] and [1][0] stay in the node, [0][2] does not, [3][3] stays on the rank."""
    leg_PP = torch.tensor([[1, 2, 4, 8], [16, 0, 0, 0], [0, 32, 0, 64], [0, 0, 128, 256]])
    sums = [sum_P.tolist() for sum_P in link_sums(leg_PP, 2)]
    assert sums == [[2, 16, 64, 128], [12, 0, 32, 0], [16, 2, 128, 64], [0, 32, 4, 8]]
