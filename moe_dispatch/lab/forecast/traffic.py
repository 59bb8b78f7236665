"""From a demand to the bytes of every collective of a layer, for three ways to dispatch.

Each collective is a *leg*: [source, destination] bytes, as the collective gets them. What stays on a rank is in the
legs of the plan and of the textbook; our rows that stay are in none.
``tests/moe_dispatch/lab/forecast/test_traffic.py`` compares the legs of counted demands with the collectives of real
runs, to the byte.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...plan.counts.facts import message_bytes
from ...plan.counts.rule import counts_cost_less, riding_steps
from ...plan.ids.format import STEP, IdFormat
from ...rows.buffer import row_bytes
from .demand import Demand

COUNT_BYTES = 8  # int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """What a row is made of: ``dim`` values of ``row_bytes``, and K weights of ``weight_bytes``."""

    dim: int
    num_choices: int
    row_bytes: int
    weight_bytes: int

    @property
    def row(self) -> int:
        return self.dim * self.row_bytes

    @property
    def weighted_row(self) -> int:
        """A row with all K weights of its token, as ``rows/buffer.py`` lays it out."""
        return row_bytes(self.row, self.num_choices * self.weight_bytes)

    def riding_row(self, num_experts: int) -> int:
        """The same with what rides there by a plan by counts."""
        riding = riding_steps(self.num_choices, num_experts) * STEP.itemsize
        return row_bytes(self.row, self.num_choices * self.weight_bytes, riding)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Traffic:
    """The collectives of one layer. The last three are in the order in which they run.

    Attributes:
        plan: bytes of each leg of the plan.
        ways: rows of each leg of the dispatch; combine and backward go the same ways, forth and home.
        kept: rows of each rank that stay there, for each leg, where they do not travel.
        there, home: bytes of a row of dispatch, and of combine.
        gradient: bytes of a row's gradient in the backward of dispatch.
        rows_P: rows of each rank's experts.
    """

    plan: tuple[Tensor, ...]
    ways: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    there: int
    home: int
    gradient: int
    rows_P: Tensor

    @property
    def dispatch(self) -> tuple[Tensor, ...]:
        return tuple(rows_PP * self.there for rows_PP in self.ways)

    @property
    def combine(self) -> tuple[Tensor, ...]:
        return tuple(rows_PP.T * self.home for rows_PP in reversed(self.ways))

    @property
    def backward(self) -> tuple[Tensor, ...]:
        out = tuple(rows_PP * self.home for rows_PP in self.ways)
        return (*out, *(rows_PP.T * self.gradient for rows_PP in reversed(self.ways)))


def row_per_choice(demand: Demand, widths: Widths) -> Traffic:
    """The textbook: counts per expert first, then one row per choice; weights stay with the tokens."""
    sizes_P = torch.tensor(demand.experts.sizes)
    counts_PP = (COUNT_BYTES * sizes_P).expand(len(sizes_P), -1)
    return Traffic(
        plan=(counts_PP,),
        ways=(demand.choices_PP,),
        kept=(torch.zeros(len(sizes_P)),),
        there=widths.row,
        home=widths.row,
        gradient=widths.row,
        rows_P=demand.choices_PP.sum(0),
    )


def row_per_rank(demand: Demand, widths: Widths) -> Traffic:
    """``plan_dispatch``, ``dispatch``, ``combine``: every choice, or counts, to every rank, then one row per token
    and rank."""
    ranks, num_experts = len(demand.experts), demand.experts.total
    by_counts = counts_cost_less(ranks, widths.num_choices, num_experts)
    message_P = routing_bytes(demand.tokens_P, widths.num_choices, num_experts)
    if by_counts:
        message_P = torch.full_like(message_P, message_bytes(max(demand.experts.sizes)))
    plan = (message_P.unsqueeze(1).expand(ranks, ranks),)
    ways, kept = _travelling(demand.tokens_PP)
    return Traffic(
        plan=plan,
        ways=ways,
        kept=kept,
        there=widths.riding_row(num_experts) if by_counts else widths.weighted_row,
        home=widths.row,
        gradient=widths.weighted_row,
        rows_P=demand.choices_PP.sum(0),
    )


def row_per_node(demand: Demand, widths: Widths) -> Traffic:
    """A plan of ``plan_hierarchical``: one row for each node that a token needs, sent to the rank with the sender's
    place on that node, then one row for each rank that the token needs there."""
    num_nodes, in_node = demand.num_nodes, demand.in_node
    column_PP, node_PP = same_column(num_nodes, in_node), same_node(num_nodes, in_node)
    between_PP = demand.tokens_PN.repeat_interleave(in_node, dim=1) * column_PP
    # What rank (node, place) passes on to a rank of its node came from all of its column.
    of_place_RP = demand.tokens_PP.unflatten(0, (num_nodes, in_node)).sum(0)
    within_PP = of_place_RP.repeat(num_nodes, 1) * node_PP
    passed_P = demand.tokens_P.unflatten(0, (num_nodes, in_node)).sum(0).repeat(num_nodes)
    experts_N = torch.tensor(demand.experts.sizes).unflatten(0, (num_nodes, in_node)).sum(1)
    inside = [
        routing_bytes(passed_R, widths.num_choices, experts)
        for passed_R, experts in zip(passed_P.split(in_node), experts_N.tolist(), strict=True)
    ]
    inside_P = torch.cat(inside)
    first_P = routing_bytes(demand.tokens_P, widths.num_choices, demand.experts.total)
    plan = (first_P.unsqueeze(1) * column_PP, inside_P.unsqueeze(1) * node_PP)
    ways, kept = _travelling(between_PP, within_PP)
    return Traffic(
        plan=plan,
        ways=ways,
        kept=kept,
        there=widths.weighted_row,
        home=widths.row,
        gradient=widths.weighted_row,
        rows_P=demand.choices_PP.sum(0),
    )


def _travelling(*legs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The rows of each leg that go to another rank, and those that stay."""
    kept = tuple(rows_PP.diagonal() for rows_PP in legs)
    return tuple(rows_PP - own_P.diag() for rows_PP, own_P in zip(legs, kept, strict=True)), kept


def routing_bytes(tokens_P: Tensor, num_choices: int, num_experts: int) -> Tensor:
    """Bytes of one message of a plan, of ranks with so many tokens: what ``plan/ids/format.py`` says."""
    empty, one = (IdFormat.of(num_choices, num_experts).message_bytes(tokens) for tokens in (0, 1))
    return empty + tokens_P * (one - empty)


def same_node(num_nodes: int, in_node: int) -> Tensor:
    """(P, P) bool: are the two on one node?"""
    node_P = torch.arange(num_nodes).repeat_interleave(in_node)
    return node_P.unsqueeze(1) == node_P


def same_column(num_nodes: int, in_node: int) -> Tensor:
    """(P, P) bool: have the two the same place on their nodes?"""
    place_P = torch.arange(in_node).repeat(num_nodes)
    return place_P.unsqueeze(1) == place_P
