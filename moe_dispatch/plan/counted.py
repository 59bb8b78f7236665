"""Plans whose sizes are counted: every rank learns how many rows it gets before any row moves."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.partition import Partition
from ..layout.sharding import TokenSharding
from ..wire.agreement import BAD, Statement
from ..wire.policies import unseen_by_policies
from ..wire.uncompiled import uncompiled
from .ids.checks import expected_message, ids_and_word, problem_of_arguments, problem_of_values
from .ids.exchange import IdsExchange
from .metadata import DispatchMetadata
from .row_index import ReceivedRows, SentRows
from .terms import Terms


@dataclass(frozen=True, slots=True)
class Counted:
    """The planner of :func:`plan_dispatch`, for :class:`MoE`: as many rows as there are, one copy to the host."""

    def check_group(self, experts: Partition, group: dist.ProcessGroup) -> None:
        """Any group will do."""

    def new_report(self, ranks: int) -> Tensor:
        """Empty: what is wrong is raised while planning."""
        return torch.zeros(0, dtype=torch.int64)

    def check_report(self, report: Tensor) -> None:
        """Nothing to check."""

    @unseen_by_policies
    @torch.no_grad()
    def plan(
        self, expert_BlK: Tensor, weight_BlK: Tensor | None, terms: Terms, group: dist.ProcessGroup
    ) -> DispatchMetadata:
        """See :func:`plan_dispatch`."""
        terms.check(group)
        rank, sharding = group.rank(), terms.sharding
        if problem := problem_of_arguments(expert_BlK, weight_BlK, sharding, rank):
            num_choices, device = expected_message(expert_BlK, weight_BlK)
            self.refuse(problem, terms, group, num_choices=num_choices, device=device)
        expert_BlK = expert_BlK.to(torch.int64)
        tokens = terms.tokens(rank, expert_BlK.shape[2], expert_BlK.device)
        id_tK, word = ids_and_word(expert_BlK, weight_BlK, tokens)
        exchange = IdsExchange.start(id_tK, word, tokens, group)
        sent_rows = SentRows.of(id_tK, tokens)
        sent_P = sent_rows.count_P
        id_GK, word_P = exchange.wait()
        received_rows = ReceivedRows.of(id_GK, tokens)
        counts = (word_P, sent_P, received_rows.received_before_P1, received_rows.count_1)
        # The one copy to the host.
        words, sent, received_before, (num_rows,) = _split(torch.cat(counts).tolist(), map(len, counts))
        if set(words) != {tokens.expected}:
            problem = problem_of_values(expert_BlK, weight_BlK, terms.experts) if words[rank] == BAD else ""
            Statement(tokens.facts, problem).raise_on_every_rank(device=expert_BlK.device, group=group)
        return DispatchMetadata(
            local_shape=(*sharding.local_shape(rank), terms.dim),
            sharding=sharding,
            experts=terms.experts,
            rank=rank,
            group=group,
            rows_sent=tokens.by_rank(sent),
            rows_received=tokens.by_rank([after - before for before, after in pairwise(received_before)]),
            expert_BlK=expert_BlK.clone(),
            **sent_rows.index(sum(sent)),
            **received_rows.index(received_before[-1], num_rows),
        )

    @torch.no_grad()
    def refuse(
        self, problem: str, terms: Terms, group: dist.ProcessGroup, *, num_choices: int, device: torch.device
    ) -> NoReturn:
        """Take this rank's part in a plan that it cannot make, and raise ``problem`` on every rank.

        Args:
            problem: what is wrong here; the peers are in :meth:`plan`.
            num_choices: K, as the peers believe.
            device: that the group communicates on.
        """
        terms.check(group)
        tokens = terms.tokens(group.rank(), num_choices, device)
        IdsExchange.refuse(BAD, tokens, terms.sharding.local_sizes[group.rank()], group, device)
        Statement("", problem).raise_on_every_rank(device=device, group=group)


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

    The first two are raised after the exchange of ids and before any row moves; the group stays usable. What changes
    *how much* a rank sends cannot be told this way: a shard of another size, or a K that takes another number of
    steps of 4 bytes. The backend then fails, or waits for its time-out.
    """
    terms = Terms(sharding=sharding, experts=experts, dim=dim, dtype=dtype)
    return Counted().plan(expert_BlK, weight_BlK, terms, group)


def _split(values: list[int], sizes: Iterable[int]) -> Iterator[tuple[int, ...]]:
    start = 0
    for size in sizes:
        yield tuple(values[start : start + size])
        start += size
