"""The exchange of a plan by counts. Each rank tells each its word, how many rows come, and how many choices fell on
each of its experts: the experts alone say how much that is."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ...wire.agreement import BAD
from ...wire.exchange import FinishedExchange, PendingExchange, start_exchange
from ..ids.format import STEP
from .facts import HEAD_STEPS, CountsFacts


@dataclass(frozen=True, slots=True)
class CountsExchange:
    """The exchange on its way."""

    pending: PendingExchange | FinishedExchange
    facts: CountsFacts

    @classmethod
    def start(
        cls, id_tK: Tensor, rows_P: Tensor, is_bad: Tensor, facts: CountsFacts, group: dist.ProcessGroup
    ) -> "CountsExchange":
        """Send a word and counts to every rank.

        Args:
            id_tK: (t, K), expert ids, -1 for "no expert".
            rows_P: rows for each rank.
            is_bad: (), whether this rank has a problem. Its word is then BAD, else ``facts.expected``.
        """
        message_PW = torch.zeros(facts.num_ranks, facts.message_steps, dtype=STEP, device=id_tK.device)
        step_C = facts.step_of_id.take(id_tK).view(-1)
        message_PW.view(-1).scatter_add_(0, step_C, facts.one.expand(step_C.shape))
        message_PW[:, 0].fill_(facts.expected).masked_fill_(is_bad, BAD)
        message_PW[:, 1] = rows_P
        return cls._start(message_PW, facts, group)

    @classmethod
    def refuse(cls, word: int, facts: CountsFacts, group: dist.ProcessGroup, device: torch.device) -> None:
        """The part in the exchange of a rank that has no ids: its word, and no rows."""
        message_PW = torch.zeros(facts.num_ranks, facts.message_steps, dtype=STEP, device=device)
        message_PW[:, 0] = word
        cls._start(message_PW, facts, group).wait()

    @classmethod
    def _start(cls, message_PW: Tensor, facts: CountsFacts, group: dist.ProcessGroup) -> "CountsExchange":
        steps = (facts.message_steps,) * facts.num_ranks
        return cls(start_exchange(message_PW.view(-1), steps, steps, group), facts)

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """The words of all ranks, (P,) int32; the rows that come from each, (P,) int32; and how many choices of all
        fell on each of this rank's experts, (e,) int64."""
        message_PW = self.pending.wait().view(self.facts.num_ranks, self.facts.message_steps)
        choices_Pe = message_PW[:, HEAD_STEPS : HEAD_STEPS + self.facts.num_mine]
        return message_PW[:, 0], message_PW[:, 1], choices_Pe.sum(0)
