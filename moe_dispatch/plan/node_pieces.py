"""What both steps of a hierarchical plan are made over, and how the second becomes one of the tokens that came."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layout.partition import Partition
from ..layout.sharding import TokenSharding
from ..layout.stacked import stacked_tokens
from .metadata import DispatchMetadata, KnownIndex
from .row_index import RowIndex, inverse


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePieces:
    """The tokens and experts of both steps: the same for all layers of a step. Kept by the sharding of all ranks, so
    that what its pieces keep (``GroupTokens``) is made once too.

    Attributes:
        column: the tokens of this rank's column.
        experts_of_nodes: the experts of each node.
        tokens_of_node: the tokens of all columns, as the tokens that the ranks of this node hold: those of a column
            in the order in which they arrive from between nodes (G).
        mine: the experts of this node's ranks.
        held: the same, but one that nobody chooses for a node without: it owes its part in the exchange too.
        token_of_all_A: global token of each of ``tokens_of_node``.
        sorted_token_G, g_of_sorted_G: the tokens of this rank's column in ascending order, and where they arrive.
    """

    column: TokenSharding
    experts_of_nodes: Partition
    tokens_of_node: TokenSharding
    mine: Partition
    held: Partition
    token_of_all_A: Tensor
    sorted_token_G: Tensor
    g_of_sorted_G: Tensor

    @classmethod
    def of(
        cls,
        sharding: TokenSharding,
        experts: Partition,
        *,
        num_nodes: int,
        node: int,
        local_rank: int,
        device: torch.device,
    ) -> "NodePieces":
        """For one rank. Made once for these arguments, and kept by the sharding."""
        return sharding.keep(
            (cls, experts, num_nodes, node, local_rank, device),
            lambda: cls._made(sharding, experts, num_nodes, node, local_rank, device),
        )

    @classmethod
    @torch.inference_mode(False)  # it outlives the call
    def _made(
        cls,
        sharding: TokenSharding,
        experts: Partition,
        num_nodes: int,
        node: int,
        local_rank: int,
        device: torch.device,
    ) -> "NodePieces":
        in_node = sharding.num_ranks // num_nodes
        ranks = range(sharding.num_ranks)
        sizes_of_nodes = [experts.sizes[n * in_node : (n + 1) * in_node] for n in range(num_nodes)]
        columns = [sharding.select(ranks[r::in_node]) for r in range(in_node)]
        nodes_by_arrival = [*(n for n in range(num_nodes) if n != node), node]  # this node's own tokens come last
        token_of_columns = [stacked_tokens(column.select(nodes_by_arrival), device) for column in columns]
        sorted_token_G, g_of_sorted_G = token_of_columns[local_rank].sort()
        mine = Partition(sizes_of_nodes[node])
        return cls(
            column=columns[local_rank],
            experts_of_nodes=Partition(map(sum, sizes_of_nodes)),
            tokens_of_node=TokenSharding(batch=1, seq=Partition(column.num_held for column in columns)),
            mine=mine,
            held=mine if mine.total else Partition((1, *mine.sizes[1:])),
            token_of_all_A=torch.cat(token_of_columns),
            sorted_token_G=sorted_token_G,
            g_of_sorted_G=g_of_sorted_G,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CameTokens:
    """What the plan between nodes says of the tokens that came.

    G: tokens of the column, in the order in which they arrive. R: those that came.
    """

    g_of_received_R: Tensor
    expert_GK: Tensor  # of my node, counted from its first; -1 for choices elsewhere


def tokens_that_came(between: DispatchMetadata, pieces: NodePieces) -> CameTokens:
    """The tokens that came to this rank from between nodes, with what they chose in this node."""
    device, num_choices = between.expert_BlK.device, between.expert_BlK.shape[2]
    token_of_received_R = torch.zeros(between.num_received, dtype=torch.int64, device=device)
    index = between.index
    token_of_received_R[index.received_of_row_M] = index.token_of_row_M
    g_of_received_R = pieces.g_of_sorted_G[torch.searchsorted(pieces.sorted_token_G, token_of_received_R)]
    expert_GK = torch.full((len(pieces.g_of_sorted_G), num_choices), -1, dtype=torch.int64, device=device)
    expert_GK[g_of_received_R[index.received_of_row_M], index.choice_of_row_M] = expert_of_row(between)
    return CameTokens(g_of_received_R=g_of_received_R, expert_GK=expert_GK)


def within_of_came(plan: DispatchMetadata, came: CameTokens, pieces: NodePieces) -> DispatchMetadata:
    """The plan within a node, made of all tokens of its columns, as one of the tokens that came, rows in global
    order."""
    received_of_G = torch.zeros_like(came.expert_GK[:, 0])  # 0 for tokens that did not come: they have no entry
    num_came = len(came.g_of_received_R)
    received_of_G[came.g_of_received_R] = torch.arange(num_came, device=received_of_G.device)
    index = plan.index
    token_of_row_M = pieces.token_of_all_A[index.token_of_row_M]
    # As flat: by expert, then global token; a stable sort leaves the choices of a token in order.
    key_of_row_M = expert_of_row(plan) * pieces.column.num_tokens + token_of_row_M
    old_of_row_M = key_of_row_M.argsort(stable=True)
    row_of_old_M = inverse(old_of_row_M)
    return replace(
        plan,
        local_shape=(1, num_came, plan.local_shape[2]),
        expert_BlK=came.expert_GK[came.g_of_received_R].unsqueeze(0),
        experts=pieces.mine,
        rows_per_expert_e=plan.rows_per_expert_e[: pieces.mine.sizes[plan.rank]].clone(),
        row_index=KnownIndex(
            RowIndex(
                token_of_row_M=token_of_row_M[old_of_row_M],
                received_of_row_M=index.received_of_row_M[old_of_row_M],
                choice_of_row_M=index.choice_of_row_M[old_of_row_M],
                row_of_entry_M=row_of_old_M[index.row_of_entry_M],
                first_entry_R=index.first_entry_R,
            )
        ),
        token_of_sent_S=received_of_G[plan.token_of_sent_S],
        first_entry_t=plan.first_entry_t[came.g_of_received_R],
    )


def expert_of_row(plan: DispatchMetadata) -> Tensor:
    """(M,) expert of each row, counted from the first one here."""
    rows_e = plan.rows_per_expert_e
    return torch.arange(len(rows_e), device=rows_e.device).repeat_interleave(rows_e, output_size=plan.num_rows)
