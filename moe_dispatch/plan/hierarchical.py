"""The plan of a dispatch in two steps, first between nodes and then inside: ``plan_dispatch`` twice.

P ranks are N nodes of R, numbered node after node: rank = node * R + place. A *column* is the ranks of one place, one
per node. *Between* nodes, a plan over the column, in which a node owns the experts of its ranks, brings each token
once to every node that needs it, to the rank of its own place there. *Within* the node, a plan over the node's ranks
brings the tokens that came to their experts. Each rank of a node learns all choices that fell on the node, in
messages whose size the sharding tells; the flat plan sends them between nodes R times as often.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.partition import Partition
from ..layout.sharding import TokenSharding
from ..wire.exchange import check_group
from .counted import DispatchMetadata, plan_dispatch, refuse_plan
from .group_tokens import facts_of
from .row_index import inverse


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGroups:
    """The two process groups of a rank, as a DeviceMesh of (nodes, ranks per node) has them.

    Attributes:
        inter: the ranks of this rank's column, in the order of their nodes.
        intra: the ranks of this rank's node, in the order of their places.
    """

    inter: dist.ProcessGroup
    intra: dist.ProcessGroup

    @property
    def num_ranks(self) -> int:
        return self.inter.size() * self.intra.size()

    @property
    def rank(self) -> int:
        """This rank's number among all."""
        return self.inter.rank() * self.intra.size() + self.intra.rank()

    def column(self, place: int) -> range:
        """The ranks of one place."""
        return range(place, self.num_ranks, self.intra.size())

    def node(self, node: int) -> range:
        """The ranks of one node."""
        return range(node * self.intra.size(), (node + 1) * self.intra.size())


@dataclass(frozen=True, slots=True, kw_only=True)
class HierarchicalPlan:
    """Both steps of one dispatch. Made by :func:`plan_hierarchical`; holds no activation.

    Attributes:
        nodes: the groups.
        between: the plan over this rank's column. Its received rows, one per token, are the tokens of ``within``.
        within: the plan over this rank's node. Its rows are those of the flat plan: by expert, then global token,
            then choice.
    """

    nodes: NodeGroups
    between: DispatchMetadata
    within: DispatchMetadata

    @property
    def rows_per_expert_e(self) -> Tensor:
        """(e,) how many rows each of this rank's experts got."""
        return self.within.rows_per_expert_e

    @property
    def token_of_row_M(self) -> Tensor:
        """(M,) global token of each row."""
        return self.within.token_of_row_M


@torch.no_grad()
def plan_hierarchical(
    expert_BlK: Tensor,
    *,
    dim: int,
    sharding: TokenSharding,
    experts: Partition,
    nodes: NodeGroups,
    weight_BlK: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> HierarchicalPlan:
    """Plan which rows go where, between nodes and within. Two collectives of known size, the routing over the column
    and that over the node, and a copy to the host after each.

    Args:
        expert_BlK, dim, weight_BlK, dtype: as in :func:`plan_dispatch`.
        sharding: the tokens of all ranks, one shard per rank.
        experts: the experts of all ranks.
        nodes: this rank's two groups.

    Raises:
        ValueError: the same text on every rank of every node, and before any row moves: whatever one rank has wrong
            that :func:`plan_dispatch` reports, and ranks that disagree about dim, dtype, experts, sharding or K.
            Sizes that do not fit the groups, and groups of this rank that do not number ranks node after node, are
            refused before any collective, by the ranks that see it. Beliefs that change how much is sent break the
            backend, as in :func:`plan_dispatch`.
    """
    _check_groups(sharding, experts, nodes)
    pieces = _Pieces.of(sharding, experts, nodes)
    is_tensor = isinstance(expert_BlK, Tensor)
    num_choices = max(expert_BlK.shape[-1], 1) if is_tensor and expert_BlK.ndim else 1
    facts = facts_of(num_choices, dim, sharding, experts, dtype)
    try:
        between = plan_dispatch(
            expert_BlK,
            dim=dim,
            sharding=pieces.column,
            experts=pieces.nodes_experts,
            group=nodes.inter,
            weight_BlK=weight_BlK,
            dtype=dtype,
            facts=facts,
        )
    except ValueError as error:  # the same in all of the column; the node's other ranks have to learn of it
        refuse_plan(
            f"between nodes, where rank i is rank {nodes.intra.rank()} + {nodes.intra.size()} i of all: {error}",
            num_choices=num_choices,
            device=expert_BlK.device if is_tensor else torch.device("cpu"),
            dim=dim,
            sharding=pieces.all_of_node,
            experts=pieces.held,
            group=nodes.intra,
        )
        raise  # not reached: refuse_plan raises
    came = _TokensOfNode.of(between, pieces.arriving[nodes.intra.rank()])
    plan = plan_dispatch(
        came.expert_GK.unsqueeze(0),
        dim=dim,
        sharding=pieces.all_of_node,
        experts=pieces.held,
        group=nodes.intra,
        facts=facts,
    )
    return HierarchicalPlan(nodes=nodes, between=between, within=_renumbered(plan, came, pieces))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pieces:
    """What both plans are made over: the same for all layers of a step. Kept by the sharding of all ranks, so that
    what its pieces keep (``Grid``) is made once too.

    Attributes:
        column: the tokens of this rank's column.
        nodes_experts: the experts of each node.
        arriving: the tokens of each of the columns, in the order in which they arrive from between nodes.
        all_of_node: those of all columns, as the tokens of this node.
        mine: the experts of this node's ranks.
        held: the same, but one that nobody chooses for a node without: it owes its part in the exchange too.
    """

    column: TokenSharding
    nodes_experts: Partition
    arriving: tuple[TokenSharding, ...]
    all_of_node: TokenSharding
    mine: Partition
    held: Partition

    @classmethod
    def of(cls, sharding: TokenSharding, experts: Partition, nodes: NodeGroups) -> "_Pieces":
        key = (cls, experts, nodes.inter.size(), nodes.intra.size(), nodes.rank)
        return sharding.keep(key, lambda: cls._made(sharding, experts, nodes))

    @classmethod
    def _made(cls, sharding: TokenSharding, experts: Partition, nodes: NodeGroups) -> "_Pieces":
        per_node = [Partition(experts.sizes[rank] for rank in nodes.node(node)) for node in range(nodes.inter.size())]
        columns = [sharding.select(nodes.column(place)) for place in range(nodes.intra.size())]
        home = nodes.inter.rank()  # this node's own tokens come last
        order = [*(node for node in range(nodes.inter.size()) if node != home), home]
        mine = per_node[home]
        return cls(
            column=columns[nodes.intra.rank()],
            nodes_experts=Partition(of_node.total for of_node in per_node),
            arriving=tuple(column.select(order) for column in columns),
            all_of_node=TokenSharding(batch=1, seq=Partition(sum(column.local_sizes) for column in columns)),
            mine=mine,
            held=mine if mine.total else Partition((1, *mine.sizes[1:])),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokensOfNode:
    """What the plan between nodes says of the tokens that came.

    G: tokens of the column, in the order in which they arrive. R: those that came.
    """

    g_of_received_R: Tensor
    expert_GK: Tensor  # of my node, counted from its first; -1 for choices elsewhere

    @classmethod
    def of(cls, between: DispatchMetadata, column: TokenSharding) -> "_TokensOfNode":
        device, num_choices = between.expert_BlK.device, between.expert_BlK.shape[2]
        token_of_received_R = torch.zeros(sum(between.rows_received), dtype=torch.int64, device=device)
        token_of_received_R[between.received_of_row_M] = between.token_of_row_M
        rank_of_received_R, local_token_R = column.locate(token_of_received_R)
        offsets = torch.tensor(column.local_starts, dtype=torch.int64, device=device)
        g_of_received_R = offsets[rank_of_received_R] + local_token_R
        expert_GK = torch.full((sum(column.local_sizes), num_choices), -1, dtype=torch.int64, device=device)
        expert_GK[g_of_received_R[between.received_of_row_M], between.choice_of_row_M] = _expert_of_row(between)
        return cls(g_of_received_R=g_of_received_R, expert_GK=expert_GK)

    @property
    def received_of_G(self) -> Tensor:
        """(G,) the inverse; 0 for tokens that did not come."""
        received_of_G = torch.zeros_like(self.expert_GK[:, 0])
        received_of_G[self.g_of_received_R] = torch.arange(len(self.g_of_received_R), device=received_of_G.device)
        return received_of_G


def _renumbered(plan: DispatchMetadata, came: _TokensOfNode, pieces: _Pieces) -> DispatchMetadata:
    """The plan inside a node, of all tokens of its columns, as one of the tokens that came, rows in global order."""
    columns, device = pieces.arriving, came.expert_GK.device
    token_of_row_M = torch.cat([column.stacked_tokens(device) for column in columns])[plan.token_of_row_M]
    # As flat: by expert, then global token; a stable sort leaves the choices of a token in order.
    old_of_row_M = (_expert_of_row(plan) * columns[0].num_tokens + token_of_row_M).argsort(stable=True)
    row_of_old_M = inverse(old_of_row_M)
    return replace(
        plan,
        local_shape=(1, len(came.g_of_received_R), plan.local_shape[2]),
        expert_BlK=came.expert_GK[came.g_of_received_R].unsqueeze(0),
        experts=pieces.mine,
        rows_per_expert_e=plan.rows_per_expert_e[: pieces.mine.sizes[plan.rank]].clone(),
        token_of_row_M=token_of_row_M[old_of_row_M],
        received_of_row_M=plan.received_of_row_M[old_of_row_M],
        choice_of_row_M=plan.choice_of_row_M[old_of_row_M],
        row_of_entry_M=row_of_old_M[plan.row_of_entry_M],
        token_of_sent_S=came.received_of_G[plan.token_of_sent_S],
        first_entry_t=plan.first_entry_t[came.g_of_received_R],
    )


def _expert_of_row(plan: DispatchMetadata) -> Tensor:
    """(M,) expert of each row, counted from the first one here."""
    rows_e = plan.rows_per_expert_e
    return torch.arange(len(rows_e), device=rows_e.device).repeat_interleave(
        rows_e, output_size=len(plan.token_of_row_M)
    )


def _check_groups(sharding: TokenSharding, experts: Partition, nodes: NodeGroups) -> None:
    for group in (nodes.inter, nodes.intra):
        if not isinstance(group, dist.ProcessGroup):
            check_group(group, 1, "")
    shape = f"{nodes.inter.size()} nodes of {nodes.intra.size()} ranks"
    for what, ranks in (("the token sharding", sharding.num_ranks), ("the partition of experts", len(experts))):
        if ranks != nodes.num_ranks:
            raise ValueError(f"{what} describes {ranks} ranks, but there are {shape}; it needs one piece per rank")
    in_node, in_column = dist.get_process_group_ranks(nodes.intra), dist.get_process_group_ranks(nodes.inter)
    span, ascending = in_node[-1] - in_node[0], in_node == sorted(in_node)
    if not ascending or any(later - first <= span for first, later in pairwise(in_column)):
        raise ValueError(
            f"a node of the ranks {in_node} and a column of the ranks {in_column}; ranks have to be numbered node "
            "after node, as the dimensions of a DeviceMesh (nodes, ranks per node) are: inter is its first, intra "
            "its second"
        )
