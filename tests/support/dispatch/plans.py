"""Plans of a case, of any kind: its sharding, sizes that are enough for it, groups of ranks for nodes."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import (
    Counted,
    DispatchMetadata,
    NodeGroups,
    Partition,
    StaticSizes,
    TokenSharding,
    plan_dispatch,
    plan_hierarchical,
    plan_static,
)
from moe_dispatch.plan.counts.by_counts import ByCounts
from moe_dispatch.plan.ids.by_ids import ByIds
from moe_dispatch.plan.planner import Planner
from moe_dispatch.plan.terms import Terms
from tests.support.dispatch.dense import Case, crossings, make_case, rank_of_expert
from tests.support.dispatch.layouts import Layout
from tests.support.ranks import world

Kind = Literal["counted", "static", "hierarchical", "by ids", "by counts"]
KINDS: tuple[Kind, ...] = ("counted", "static", "hierarchical")
Planning = Callable[..., Any]  # plan_dispatch, plan_static or plan_hierarchical with its group, sizes or nodes


def sharding_of(layout: Layout) -> TokenSharding:
    """An int where there is one piece, so that both ways to say it are met."""
    batch, seq = (cut[0] if len(cut) == 1 else Partition(cut) for cut in (layout.batch, layout.seq))
    return TokenSharding(batch=batch, seq=seq, order=layout.order)


@contextmanager
def node_groups(rank: int, num_nodes: int, in_node: int) -> Iterator[NodeGroups]:
    """The groups of rank = node * in_node + peer, by listing the ranks."""
    nodes = [list(range(node * in_node, node * in_node + in_node)) for node in range(num_nodes)]
    columns = [list(column) for column in zip(*nodes, strict=True)]
    made = {tuple(ranks): dist.new_group(ranks) for ranks in [*columns, *nodes]}
    inter, intra = (next(group for ranks, group in made.items() if rank in ranks and ranks in wanted)
                    for wanted in ([*map(tuple, columns)], [*map(tuple, nodes)]))  # fmt: skip
    assert isinstance(inter, dist.ProcessGroup)
    assert isinstance(intra, dist.ProcessGroup)
    try:
        yield NodeGroups(inter=inter, intra=intra)
        dist.barrier()  # not behind an exception: the peers may be elsewhere, and it would hide it
    finally:
        for group in {inter, intra}:
            dist.destroy_process_group(group)


def enough(case: Case) -> StaticSizes:
    """The smallest sizes that hold a case, from lists."""
    pairs = crossings(case.layout, case.experts, case.expert_BLK)
    rank_of = rank_of_expert(case.experts)
    rows = [0] * case.layout.ranks
    for expert in case.expert_BLK.flatten().tolist():
        if expert >= 0:
            rows[rank_of[expert]] += 1
    return StaticSizes(rows_per_pair=max(1, *map(max, pairs)), rows=max(1, *rows))


def counted(expert_BlK: Tensor, **given: Any) -> DispatchMetadata:
    """A counted plan over all ranks."""
    return plan_dispatch(expert_BlK, group=world(), **given)


@dataclass(frozen=True, slots=True)
class OfForm(Counted):
    """A counted planner of one form, whatever the number of ranks."""

    form: ByIds | ByCounts

    def plan(
        self, expert_BlK: Tensor, weight_BlK: Tensor | None, terms: Terms, group: dist.ProcessGroup
    ) -> DispatchMetadata:
        return self.form.plan(expert_BlK, weight_BlK, terms, group)

    def refuse(
        self, problem: str, terms: Terms, group: dist.ProcessGroup, *, num_choices: int, device: torch.device
    ) -> NoReturn:
        self.form.refuse(problem, terms, group, num_choices=num_choices, device=device)

    def __call__(self, expert_BlK: Tensor, weight_BlK: Tensor | None = None, **terms: Any) -> DispatchMetadata:
        """A plan over all ranks."""
        return self.plan(expert_BlK, weight_BlK, Terms(**terms), world())


FORMS: dict[Kind, OfForm] = {"by ids": OfForm(ByIds()), "by counts": OfForm(ByCounts())}


@contextmanager
def planner_of(kind: Kind, rank: int, sizes: StaticSizes) -> Iterator[Planner]:
    """What makes the plans of a layer over all ranks. Of P ranks, at least sqrt(P) nodes."""
    if kind == "hierarchical":
        ranks = dist.get_world_size()
        num_nodes = next(n for n in range(1, ranks + 1) if n * n >= ranks and ranks % n == 0)
        with node_groups(rank, num_nodes, ranks // num_nodes) as nodes:
            yield nodes
    else:
        yield sizes if kind == "static" else FORMS.get(kind, Counted())


@contextmanager
def planning(kind: Kind, rank: int, sizes: StaticSizes) -> Iterator[Planning]:
    """The same as a function that makes one plan."""
    with planner_of(kind, rank, sizes) as planner:
        if isinstance(planner, NodeGroups):
            yield functools.partial(plan_hierarchical, nodes=planner)
        elif isinstance(planner, StaticSizes):
            yield functools.partial(plan_static, group=world(), sizes=planner)
        else:
            yield FORMS.get(kind, counted)


def crowded(ranks: int, seed: int) -> Case:
    torch.manual_seed(seed)
    layout = Layout(batch=(2,), seq=(3, 0, 5, 2)[:ranks])
    return make_case(layout, "holes", experts=(2, 1, 0, 3)[:ranks], num_choices=3, dim=4, width=4)
