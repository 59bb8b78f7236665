"""Plans whose sizes are counted: every rank learns how many rows it gets before any row moves."""

from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.partition import Partition
from ..layout.sharding import TokenSharding
from ..wire.uncompiled import uncompiled
from .counts.by_counts import ByCounts
from .counts.rule import counts_cost_less
from .ids.by_ids import ByIds
from .ids.checks import expected_choices
from .metadata import DispatchMetadata
from .terms import Terms


@dataclass(frozen=True, slots=True)
class Counted:
    """The planner of :func:`plan_dispatch`, for :class:`MoE`: as many rows as there are, one copy to the host.

    Two forms of it make the same plan. One sends the ids of each rank to every rank; the other sends counts, and the
    ids with the rows. Which one costs less follows from the number of ranks, K and E (``counts/rule.py``).
    """

    def check_group(self, experts: Partition, group: dist.ProcessGroup) -> None:
        """Any group will do."""

    def new_report(self, ranks: int) -> Tensor:
        """Empty: what is wrong is raised while planning."""
        return torch.zeros(0, dtype=torch.int64)

    def check_report(self, report: Tensor) -> None:
        """Nothing to check."""

    def plan(
        self, expert_BlK: Tensor, weight_BlK: Tensor | None, terms: Terms, group: dist.ProcessGroup
    ) -> DispatchMetadata:
        """See :func:`plan_dispatch`."""
        return _cheaper_form(terms, expected_choices(expert_BlK, weight_BlK)).plan(
            expert_BlK, weight_BlK, terms, group
        )

    def refuse(
        self, problem: str, terms: Terms, group: dist.ProcessGroup, *, num_choices: int, device: torch.device
    ) -> NoReturn:
        """Take this rank's part in a plan that it cannot make, and raise ``problem`` on every rank.

        Args:
            problem: what is wrong here; the peers are in :meth:`plan`.
            num_choices: K, as the peers believe.
            device: that the group communicates on.
        """
        _cheaper_form(terms, num_choices).refuse(problem, terms, group, num_choices=num_choices, device=device)


def _cheaper_form(terms: Terms, num_choices: int) -> ByIds | ByCounts:
    """The same on all ranks that agree about their number, K and E, whatever else they believe."""
    by_counts = counts_cost_less(len(terms.experts), num_choices, terms.experts.total)
    return ByCounts() if by_counts else ByIds()


@uncompiled("each plan would be another graph; plan outside of what is compiled")
def plan_dispatch(
    expert_BlK: Tensor,
    *,
    dim: int,
    sharding: TokenSharding,
    experts: Partition,
    group: dist.ProcessGroup,
    weight_BlK: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> DispatchMetadata:
    """Plan which rows go where. One collective of known size, then one copy to the host: the only one of the layer.

    On few ranks the ids of all tokens go to every rank. On many (from 11 on for K = 8 of 256 experts, 13 with fewer),
    counts do, and ids travel with the rows of :func:`dispatch`: the cost of a plan then does not grow with the ranks.
    Rows, results and gradients have the same bits. What :class:`DispatchMetadata` says of received rows is then known
    once a dispatch has finished.

    Args:
        expert_BlK: (b, l, K), or (l, b, K), int64 or int32: the experts of each of this rank's tokens. -1 means no
            expert; an expert named twice counts twice.
        dim: width D of the rows to move.
        sharding: the tokens that this group holds, one shard per rank, in the group's rank order.
        experts: the experts that each rank of the group holds.
        group: the expert-parallel process group.
        weight_BlK: routing weights to check along with the ids, if the caller has them already; the plan does not
            keep them. A NaN in them can be reported on every rank only here: later, ranks without a row of that token
            would not learn of it.
        dtype: of the rows to move, if the caller knows it already: ranks that differ in it are told so here, and
            break the backend later.

    Raises:
        RankMistakeError: on every rank, naming the rank at fault: ids of the wrong dtype or shape or outside the
            experts, or a NaN weight.
        DisagreementError: on every rank: they differ in dim, dtype, experts, sharding or K.
        ValueError: a group of another size, or terms that cannot be; on every rank, before any collective.

    The first two are raised after the exchange and before any row moves; the group stays usable. What changes *how
    much* a rank sends in it cannot be told this way. On few ranks that is a shard of another size, or a K that takes
    another number of steps of 4 bytes. On many it is only a partition whose largest piece is in another class (up to
    6 experts, 14, 30 and so on), or a K that would have ids go to all. The backend then fails, or waits for its
    time-out.
    """
    terms = Terms(sharding=sharding, experts=experts, dim=dim, dtype=dtype)
    return Counted().plan(expert_BlK, weight_BlK, terms, group)
