"""The plan of a dispatch in two steps, first between nodes and then within: a counted plan twice.

P ranks are N nodes of R, numbered node after node: rank = node * R + local rank. A *column* is the ranks of one local
rank, one per node. *Between* nodes, a plan over the column brings each token once to every node that needs it, to the
same local rank there; a node owns the experts of its ranks. *Within* the node, a plan over its ranks brings the
tokens that came to their experts. Each rank of a node learns all choices that fell on the node, in messages whose
size the sharding tells; the flat plan sends them between nodes R times as often.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import GroupError
from ..layout.partition import Partition
from ..layout.sharding import TokenSharding
from ..wire.exchange import check_group, check_is_group
from ..wire.policies import unseen_by_policies
from ..wire.uncompiled import uncompiled
from .ids.by_ids import ByIds
from .ids.checks import expected_message
from .metadata import DispatchMetadata
from .node_pieces import NodePieces, tokens_that_came, within_of_came
from .terms import Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class HierarchicalPlan:
    """Both steps of one dispatch. Made by :func:`plan_hierarchical`; holds no activation.

    Attributes:
        nodes: the groups.
        between: the plan over this rank's column. Its received rows, one per token, are the tokens of ``within``.
        within: the plan over this rank's node. Its rows are those of the flat plan: by expert, then global token,
            then choice.
    """

    nodes: "NodeGroups"
    between: DispatchMetadata
    within: DispatchMetadata

    @property
    def rank(self) -> int:
        """This rank among all."""
        return self.nodes.rank

    @property
    def local_shape(self) -> tuple[int, int, int]:
        """The shape of this rank's tokens, (b, l, D), or (l, b, D) for order "LB"."""
        return self.between.local_shape

    @property
    def expert_BlK(self) -> Tensor:
        """The ids that the plan was made from."""
        return self.between.expert_BlK

    @property
    def rows_per_expert_e(self) -> Tensor:
        """(e,) how many rows each of this rank's experts got."""
        return self.within.rows_per_expert_e

    @property
    def num_rows(self) -> int:
        """Rows of this rank's experts."""
        return self.within.num_rows

    @property
    def token_of_row_M(self) -> Tensor:
        """(M,) global token of each row."""
        return self.within.token_of_row_M

    def add_report(self, report: Tensor) -> None:
        """Nothing: this plan was checked when it was made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGroups:
    """The two process groups of a rank, as a DeviceMesh of (nodes, ranks per node) has them: the planner of
    :func:`plan_hierarchical`, for :class:`MoE`.

    Attributes:
        inter: the ranks of this rank's column, in the order of their nodes.
        intra: the ranks of this rank's node, in the order of their local ranks.

    Raises:
        ValueError: no process groups, or groups that do not number ranks node after node. By the ranks that see it,
            before any collective.
    """

    inter: dist.ProcessGroup
    intra: dist.ProcessGroup

    def __post_init__(self) -> None:
        for group in (self.inter, self.intra):
            check_is_group(group)
        in_node, in_column = (dist.get_process_group_ranks(group) for group in (self.intra, self.inter))
        span, ascending = in_node[-1] - in_node[0], in_node == sorted(in_node)
        if not ascending or any(later - first <= span for first, later in pairwise(in_column)):
            raise ValueError(
                f"a node of the ranks {in_node} and a column of the ranks {in_column}; ranks have to be numbered "
                "node after node, as the dimensions of a DeviceMesh (nodes, ranks per node) are: inter is its first, "
                "intra its second"
            )

    @property
    def num_ranks(self) -> int:
        """Ranks of all nodes."""
        return self.inter.size() * self.intra.size()

    @property
    def rank(self) -> int:
        """This rank's number among all."""
        return self.inter.rank() * self.intra.size() + self.intra.rank()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "NodeGroups hold process groups, which no file can hold; set planner = Counted() on the layer before it "
            "is saved, and NodeGroups again after it is loaded"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "NodeGroups":
        """Itself: a process group cannot be copied, and a copied layer stays in its groups."""
        return self

    def check_group(self, experts: Partition, group: dist.ProcessGroup) -> None:
        """ValueError unless ``group`` has the ranks of these nodes, in the same order."""
        check_group(group, self.num_ranks, "the nodes of a hierarchical plan")
        if group.rank() != self.rank:
            raise ValueError(
                f"rank {group.rank()} of the group is rank {self.rank} of the nodes; pass the group whose ranks are "
                "numbered node after node"
            )

    def new_report(self, ranks: int) -> Tensor:
        """Empty: what is wrong is raised while planning."""
        return torch.zeros(0, dtype=torch.int64)

    def check_report(self, report: Tensor) -> None:
        """Nothing to check."""

    @torch.no_grad()
    def plan(
        self, expert_BlK: Tensor, weight_BlK: Tensor | None, terms: Terms, group: dist.ProcessGroup
    ) -> HierarchicalPlan:
        """See :func:`plan_hierarchical`; ``group``, of all ranks, is not communicated over."""
        return self.plan_nodes(expert_BlK, weight_BlK, terms)

    @unseen_by_policies
    @torch.no_grad()
    def plan_nodes(self, expert_BlK: Tensor, weight_BlK: Tensor | None, terms: Terms) -> HierarchicalPlan:
        """See :func:`plan_hierarchical`."""
        num_choices, device = expected_message(expert_BlK, weight_BlK, self.inter)
        pieces = self._pieces(terms, device)
        of_column, of_node = self._terms_of_steps(terms, pieces, num_choices)
        with self._told_to_the_node(of_node, num_choices, device):
            between = ByIds().plan(expert_BlK, weight_BlK, of_column, self.inter)
        came = tokens_that_came(between, pieces)
        of_all = ByIds().plan(came.expert_GK.unsqueeze(0), None, of_node, self.intra)
        return HierarchicalPlan(nodes=self, between=between, within=within_of_came(of_all, came, pieces))

    @torch.no_grad()
    def refuse(
        self, problem: str, terms: Terms, group: dist.ProcessGroup, *, num_choices: int, device: torch.device
    ) -> NoReturn:
        """Take this rank's part in a plan that it cannot make, and raise ``problem`` on every rank of every node."""
        of_column, of_node = self._terms_of_steps(terms, self._pieces(terms, device), num_choices)
        with self._told_to_the_node(of_node, num_choices, device):
            ByIds().refuse(problem, of_column, self.inter, num_choices=num_choices, device=device)

    def _pieces(self, terms: Terms, device: torch.device) -> NodePieces:
        shape = f"{self.inter.size()} nodes of {self.intra.size()} ranks"
        held = (("the token sharding", terms.sharding.num_ranks), ("the partition of experts", len(terms.experts)))
        for what, ranks in held:
            if ranks != self.num_ranks:
                raise ValueError(
                    f"{what} describes {ranks} ranks, but there are {shape}; it needs one piece per rank"
                )
        return NodePieces.of(
            terms.sharding,
            terms.experts,
            num_nodes=self.inter.size(),
            node=self.inter.rank(),
            local_rank=self.intra.rank(),
            device=device,
        )

    def _terms_of_steps(self, terms: Terms, pieces: NodePieces, num_choices: int) -> tuple[Terms, Terms]:
        """Between nodes and within. Both tell the facts of the whole: sums of other experts may be the same."""
        facts = terms.facts(num_choices)
        between = replace(terms, sharding=pieces.column, experts=pieces.experts_of_nodes, of_whole=facts)
        within = replace(terms, sharding=pieces.tokens_of_node, experts=pieces.held, dtype=None, of_whole=facts)
        return between, within

    @contextmanager
    def _told_to_the_node(self, of_node: Terms, num_choices: int, device: torch.device) -> Iterator[None]:
        """An error of this column, the same on all of its ranks, becomes one of each of their nodes."""
        try:
            yield
        except GroupError as error:
            place = f"rank {self.intra.rank()} + {self.intra.size()} i"
            problem = f"between nodes, where rank i is {place} of all: {error}"
            ByIds().refuse(problem, of_node, self.intra, num_choices=num_choices, device=device)


@uncompiled("each plan would be another graph; plan outside of what is compiled")
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
    """Plan which rows go where, between nodes and within. Two collectives of known size, the ids over the column and
    those over the node, and a copy to the host after each.

    Args:
        expert_BlK, dim, weight_BlK, dtype: as in :func:`plan_dispatch`.
        sharding: the tokens of all ranks, one shard per rank.
        experts: the experts of all ranks.
        nodes: this rank's two groups.

    Raises:
        RankMistakeError: on every rank of every node, and before any row moves: whatever one rank has wrong that
            :func:`plan_dispatch` reports, or ranks of a column that disagree.
        DisagreementError: on every rank: ranks of a node disagree about dim, dtype, experts, sharding or K.
        ValueError: numbers of ranks that do not fit, before any collective.

    What changes how much a rank sends breaks the backend, as in :func:`plan_dispatch`.
    """
    terms = Terms(sharding=sharding, experts=experts, dim=dim, dtype=dtype)
    return nodes.plan_nodes(expert_BlK, weight_BlK, terms)
