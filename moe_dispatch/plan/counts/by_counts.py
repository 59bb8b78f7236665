"""The plan by counts: how many rows and choices go where is told first, and ids travel with the rows.

Between each two ranks there is a message whose size the experts alone tell, and then what rows need. So a rank that
believes in other tokens, K or widths sends what its peers expect, and its word tells them.
"""

from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ...wire.agreement import BAD, Statement
from ...wire.policies import unseen_by_policies
from ..host_copy import HostCopy
from ..ids.checks import checked_ids, ids_or_refusal, raise_by_words
from ..metadata import DispatchMetadata
from ..terms import Terms
from .facts import CountsFacts
from .message import CountsExchange
from .riding import RidingIndex, told_of_tokens
from .sent import SentByChoice


@dataclass(frozen=True, slots=True)
class ByCounts:
    """Plans that cost as much on a thousand ranks as on a hundred."""

    @unseen_by_policies
    @torch.no_grad()
    def plan(
        self, expert_BlK: Tensor, weight_BlK: Tensor | None, terms: Terms, group: dist.ProcessGroup
    ) -> DispatchMetadata:
        """See :func:`plan_dispatch`."""
        expert_BlK = ids_or_refusal(self, expert_BlK, weight_BlK, terms, group)
        rank, sharding = group.rank(), terms.sharding
        facts = CountsFacts.of(terms, rank, expert_BlK.shape[2], expert_BlK.device)
        id_tK, is_bad = checked_ids(expert_BlK, weight_BlK, facts.num_experts)
        sent_rows = SentByChoice.of(id_tK, facts)
        sent_P = sent_rows.count_P
        exchange = CountsExchange.start(id_tK, sent_P, is_bad, facts, group)
        told_tW = told_of_tokens(id_tK, facts)
        word_P, received_P, choices_e = exchange.wait()
        copied = HostCopy.start(
            sent_P, choices_e.sum(0, keepdim=True), word_P, received_P
        )  # the one copy to the host
        sent, (num_rows,), words, received = copied.read()
        if set(words) != {facts.expected}:
            raise_by_words(words, facts.facts, expert_BlK, weight_BlK, terms, group)
        return DispatchMetadata(
            local_shape=(*sharding.local_shape(rank), terms.dim),
            sharding=sharding,
            experts=terms.experts,
            rank=rank,
            group=group,
            rows_sent=tuple(sent),
            rows_received=tuple(received),
            expert_BlK=id_tK.view(expert_BlK.shape),
            rows_per_expert_e=choices_e,
            **sent_rows.index(sum(sent)),
            row_index=RidingIndex(facts, num_rows, told_tW),
        )

    @torch.no_grad()
    def refuse(
        self, problem: str, terms: Terms, group: dist.ProcessGroup, *, num_choices: int, device: torch.device
    ) -> NoReturn:
        """Take this rank's part in a plan that it cannot make, and raise ``problem`` on every rank."""
        terms.check(group)
        CountsExchange.refuse(BAD, CountsFacts.of(terms, group.rank(), num_choices, device), group, device)
        Statement("", problem).raise_on_every_rank(device=device, group=group)
