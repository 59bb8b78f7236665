"""A plan whose sizes are fixed beforehand, so that nothing waits for the device: for CUDA graphs.

Between each two ranks travel ``rows_per_pair`` rows, and each rank's experts get ``rows`` rows, used or not. An
unused row belongs to no expert and to no token's sum; it holds zeros, and so does its gradient. Every rank knows all
choices, so each sees by itself whether the sizes are enough for all. Where they are not, or where a rank has a
problem, the outputs of all ranks are NaN, and the report says why (``static_report.py``).
"""

from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.partition import Partition, check_count
from ..layout.sharding import TokenSharding
from ..wire.agreement import Statement
from ..wire.policies import unseen_by_policies
from ..wire.uncompiled import uncompiled
from .ids.checks import checked_ids, ids_or_refusal
from .ids.exchange import IdsExchange
from .metadata import DispatchMetadata, KnownIndex
from .row_index import ReceivedRows, SentRows
from .static_index import index_received, index_sent, needed_sizes
from .static_report import report_of, report_size, told
from .terms import Terms

LEFT = -2  # the word of a rank that has no ids and raises: its peers would wait for it in the next exchange


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StaticPlan(DispatchMetadata):
    """A plan of fixed sizes. Made by :func:`plan_static`; :func:`dispatch` and :func:`combine` take it as any other.

    Where a row is unused, ``token_of_row_M`` is -1; ``rows_per_expert_e`` counts the used rows, which come first.

    Attributes:
        sizes: rows between each two ranks, and rows of each rank's experts.
        report: on the device, the same on every rank: what each rank has wrong, and the sizes that would have been
            enough.
        doubt: () float32 on the device: 0, or NaN where the report tells of a problem.
    """

    sizes: "StaticSizes"
    report: Tensor
    doubt: Tensor = field(compare=False)  # NaN is not equal to itself; the report says as much

    @property
    def spare(self) -> int:
        """The row of zeros that unused rows are copies of."""
        return 1

    def checked(self, y_tD: Tensor) -> Tensor:
        """The sums of this rank's tokens, without those of unused entries; NaN where the report tells of a
        problem."""
        return y_tD[: self.num_tokens] + self.doubt.to(y_tD.dtype)

    def check(self) -> None:
        """Raise if rows did not fit or a rank had a problem. It waits for the device: call it outside of what is
        captured, e.g. after each step.

        Raises:
            StaticSizesError: on every rank, with the same text.
        """
        self.sizes.check_report(self.report)

    def add_report(self, report: Tensor) -> None:
        """Add this plan's report to that of several plans, in place."""
        torch.maximum(report, self.report, out=report)


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticSizes:
    """Rows between each two ranks, and rows of each rank's experts: the planner of :func:`plan_static`, for
    :class:`MoE`.

    Attributes:
        rows_per_pair: the tokens of the largest shard are always enough.
        rows: all choices of the group are always enough.

    Raises:
        ValueError: a size that is not an int of at least 1.
    """

    rows_per_pair: int
    rows: int

    def __post_init__(self) -> None:
        check_count(self.rows_per_pair, "rows_per_pair", least=1)
        check_count(self.rows, "rows", least=1)

    def check_group(self, experts: Partition, group: dist.ProcessGroup) -> None:
        """Any group will do."""

    def new_report(self, ranks: int) -> Tensor:
        """The report of no plan yet."""
        return torch.zeros(report_size(ranks), dtype=torch.int64)

    def check_report(self, report: Tensor) -> None:
        """Raise StaticSizesError where the report tells of a problem; it is copied to the host."""
        told(report.tolist(), rows_per_pair=self.rows_per_pair, rows=self.rows)

    @unseen_by_policies
    @torch.no_grad()
    def plan(
        self, expert_BlK: Tensor, weight_BlK: Tensor | None, terms: Terms, group: dist.ProcessGroup
    ) -> StaticPlan:
        """See :func:`plan_static`."""
        terms = self._with_sizes(terms)
        expert_BlK = ids_or_refusal(self, expert_BlK, weight_BlK, terms, group)
        rank, sharding = group.rank(), terms.sharding
        tokens = terms.tokens(rank, expert_BlK.shape[2], expert_BlK.device)
        id_tK, is_bad = checked_ids(expert_BlK, weight_BlK, tokens.num_experts)
        exchange = IdsExchange.start(id_tK, is_bad, tokens, group)
        sent = index_sent(SentRows.of(id_tK, tokens), self.rows_per_pair)
        id_GK, word_P = exchange.wait()
        _raise_where_a_peer_left(word_P, tokens.facts, group)
        needed_2 = needed_sizes(id_GK, tokens)
        report = report_of(word_P, needed_2)
        received_rows = ReceivedRows.of(id_GK, tokens)
        per_expert_e, row_index = index_received(received_rows.mine_GK, tokens, self.rows_per_pair, self.rows)
        problem = report[:-2].any() | (needed_2[0] > self.rows_per_pair) | (needed_2[1] > self.rows)
        return StaticPlan(
            local_shape=(*sharding.local_shape(rank), terms.dim),
            sharding=sharding,
            experts=terms.experts,
            rank=rank,
            group=group,
            rows_sent=(self.rows_per_pair,) * group.size(),
            rows_received=(self.rows_per_pair,) * group.size(),
            expert_BlK=expert_BlK.clone(),
            sizes=self,
            report=report,
            doubt=torch.zeros((), device=word_P.device).masked_fill_(problem, torch.nan),
            rows_per_expert_e=per_expert_e,
            row_index=KnownIndex(row_index),
            **sent,
        )

    @torch.no_grad()
    def refuse(
        self, problem: str, terms: Terms, group: dist.ProcessGroup, *, num_choices: int, device: torch.device
    ) -> NoReturn:
        """Take this rank's part in a plan that it cannot make, and raise ``problem``: on every rank on the CPU. On
        another device it is raised here, and the peers have a device assertion."""
        terms.check(group)
        tokens = terms.tokens(group.rank(), num_choices, device)
        IdsExchange.refuse(LEFT, tokens, terms.sharding.local_sizes[group.rank()], group, device)
        if device.type == "cpu":
            Statement("", problem).raise_on_every_rank(device=device, group=group)
        raise ValueError(f"rank {group.rank()}: {problem}")

    def _with_sizes(self, terms: Terms) -> Terms:
        """The ranks have to agree about the sizes too."""
        return replace(terms, also=f"{self}, {terms.also}" if terms.also else f"{self}")


@uncompiled("each plan would be another graph; plan outside of what is compiled")
def plan_static(
    expert_BlK: Tensor,
    *,
    dim: int,
    sharding: TokenSharding,
    experts: Partition,
    group: dist.ProcessGroup,
    sizes: StaticSizes,
    weight_BlK: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> StaticPlan:
    """:func:`plan_dispatch` with sizes that do not depend on the ids. One collective and no copy to the host, so that
    it can be captured in a CUDA graph, together with ``dispatch``, experts that do not wait for the device,
    ``combine``, and their backward. What the sharding keeps is made in the warm-up before the capture.

    Args:
        expert_BlK, dim, sharding, experts, group, weight_BlK, dtype: as in :func:`plan_dispatch`.
        sizes: the same on every rank.

    Raises:
        RankMistakeError: on every rank, naming the rank: ids or weights of the wrong dtype or shape. On CUDA that
            rank has a ValueError, and its peers a device assertion.
        ValueError: as in :func:`plan_dispatch`.

    Ids out of range, NaN weights, ranks that disagree, and sizes that are too small are told by
    :meth:`StaticPlan.check`, and by outputs that are NaN, on every rank.
    """
    terms = Terms(sharding=sharding, experts=experts, dim=dim, dtype=dtype)
    return sizes.plan(expert_BlK, weight_BlK, terms, group)


def _raise_where_a_peer_left(word_P: Tensor, facts: str, group: dist.ProcessGroup) -> None:
    """Without reading the words on the host: an assertion, which on the CPU raises at once."""
    try:
        torch.ops.aten._assert_async.msg((word_P != LEFT).all(), "a rank has no expert ids to plan with")
    except RuntimeError:
        if word_P.device.type != "cpu":
            raise
        Statement(facts).raise_on_every_rank(device=word_P.device, group=group)
