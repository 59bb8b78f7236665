"""How many choices, tokens and nodes' tokens each rank has for each other: counted from ids, or expected."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import Partition


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demand:
    """Everything about a routing that decides how many bytes move. P ranks are N nodes, numbered node after node.

    Attributes:
        experts: of each rank.
        num_nodes: N, a divisor of P.
        tokens_P: tokens that each rank holds.
        choices_PP: [source, destination], choices that fall on the destination's experts.
        tokens_PP: [source, destination], distinct tokens that need the destination.
        tokens_PN: [source, node], distinct tokens that need the node.

    Counts are int64 where they were counted and float64 where they are expected.
    """

    experts: Partition
    num_nodes: int
    tokens_P: Tensor
    choices_PP: Tensor
    tokens_PP: Tensor
    tokens_PN: Tensor

    @property
    def in_node(self) -> int:
        """Ranks per node."""
        return len(self.experts) // self.num_nodes


def counted_demand(ids: Sequence[Tensor], experts: Partition, num_nodes: int) -> Demand:
    """What a routing asks for.

    Args:
        ids: for each rank, (t, K) int64: the experts of its tokens, -1 for none.
        experts: of each rank.
        num_nodes: a divisor of the number of ranks.

    Raises:
        ValueError: ranks that are not one per expert piece, or that the nodes do not divide.
    """
    ranks = len(experts)
    if len(ids) != ranks or num_nodes < 1 or ranks % num_nodes:
        raise ValueError(
            f"ids of {len(ids)} ranks, experts on {ranks} and {num_nodes} nodes; give ids and experts for each rank, "
            "and as many ranks on every node"
        )
    choices, tokens, nodes = [], [], []
    for ids_tK in ids:
        rank_tK = torch.where(ids_tK < 0, ranks, experts.owner(ids_tK.clamp(min=0)))
        choice_tP = torch.zeros(len(ids_tK), ranks + 1, dtype=torch.int64)
        choice_tP = choice_tP.scatter_add_(1, rank_tK, torch.ones_like(rank_tK))[:, :ranks]
        choices.append(choice_tP.sum(0))
        tokens.append((choice_tP > 0).sum(0))
        nodes.append((choice_tP > 0).unflatten(1, (num_nodes, -1)).any(2).sum(0))
    return Demand(
        experts=experts,
        num_nodes=num_nodes,
        tokens_P=torch.tensor([len(ids_tK) for ids_tK in ids]),
        choices_PP=torch.stack(choices),
        tokens_PP=torch.stack(tokens),
        tokens_PN=torch.stack(nodes),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chances:
    """Of one token, wherever it lives.

    Attributes:
        choices_P: expected number of its choices on each rank.
        ranks_P: probability that it needs each rank.
        nodes_N: probability that it needs each node.
    """

    choices_P: Tensor
    ranks_P: Tensor
    nodes_N: Tensor


def expected_demand(chances: Chances, experts: Partition, tokens_per_rank: int) -> Demand:
    """The mean demand of ranks with as many tokens each."""
    ranks, num_nodes = len(experts), len(chances.nodes_N)
    return Demand(
        experts=experts,
        num_nodes=num_nodes,
        tokens_P=torch.full((ranks,), tokens_per_rank),
        choices_PP=(tokens_per_rank * chances.choices_P).expand(ranks, ranks),
        tokens_PP=(tokens_per_rank * chances.ranks_P).expand(ranks, ranks),
        tokens_PN=(tokens_per_rank * chances.nodes_N).expand(ranks, num_nodes),
    )
