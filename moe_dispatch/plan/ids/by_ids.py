"""The plan by ids: every rank gets all ids of the group first, and knows from them which rows come to it."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ...wire.agreement import BAD, Statement
from ...wire.policies import unseen_by_policies
from ..host_copy import HostCopy
from ..metadata import DispatchMetadata, KnownIndex
from ..row_index import ReceivedRows, SentRows
from ..terms import Terms
from .checks import checked_ids, ids_or_refusal, raise_by_words
from .exchange import IdsExchange
from .sent_pairs import SentPairs


@dataclass(frozen=True, slots=True)
class ByIds:
    """Plans whose received rows are known at once, as those of both steps of a hierarchical plan have to be."""

    @unseen_by_policies
    @torch.no_grad()
    def plan(
        self, expert_BlK: Tensor, weight_BlK: Tensor | None, terms: Terms, group: dist.ProcessGroup
    ) -> DispatchMetadata:
        """See :func:`plan_dispatch`."""
        expert_BlK = ids_or_refusal(self, expert_BlK, weight_BlK, terms, group)
        rank, sharding = group.rank(), terms.sharding
        tokens = terms.tokens(rank, expert_BlK.shape[2], expert_BlK.device)
        id_tK, is_bad = checked_ids(expert_BlK, weight_BlK, tokens.num_experts)
        exchange = IdsExchange.start(id_tK, is_bad, tokens, group)
        sent_rows = SentRows.of(id_tK, tokens)
        sent_P = sent_rows.count_P
        id_GK, word_P = exchange.wait()
        received_rows = ReceivedRows.of(id_GK, tokens)
        # The one copy to the host.
        copied = HostCopy.start(sent_P, received_rows.received_before_P1, received_rows.count_1, word_P)
        sent, received_before, (num_rows,), words = copied.read()
        if set(words) != {tokens.expected}:
            raise_by_words(words, tokens.facts, expert_BlK, weight_BlK, terms, group)
        per_expert_e, row_index = received_rows.index(received_before[-1], num_rows)
        return DispatchMetadata(
            local_shape=(*sharding.local_shape(rank), terms.dim),
            sharding=sharding,
            experts=terms.experts,
            rank=rank,
            group=group,
            rows_sent=tokens.by_rank(sent),
            rows_received=tokens.by_rank([after - before for before, after in pairwise(received_before)]),
            expert_BlK=id_tK.view(expert_BlK.shape),
            rows_per_expert_e=per_expert_e,
            **sent_rows.index(sum(sent), SentPairs.of(sharding, rank, expert_BlK.device)),
            row_index=KnownIndex(row_index),
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
