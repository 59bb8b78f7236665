"""The exchange of a plan: every rank's expert ids on every rank of the group, in one collective of known size.

The sharding says how many tokens each peer holds, so nothing has to be asked first. Each message starts with the
sender's word.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ...wire.agreement import BAD
from ...wire.exchange import FinishedExchange, PendingExchange, copies_sent, start_gather
from .format import STEP
from .group_tokens import GroupTokens


@dataclass(frozen=True, slots=True)
class IdsExchange:
    """The exchange on its way."""

    pending: PendingExchange | FinishedExchange
    tokens: GroupTokens

    @classmethod
    def start(cls, id_tK: Tensor, is_bad: Tensor, tokens: GroupTokens, group: dist.ProcessGroup) -> "IdsExchange":
        """Send expert ids and a word to every rank.

        Args:
            id_tK: (t, K), expert ids, -1 for "no expert".
            is_bad: (), whether this rank has a problem. Its word is then BAD, else ``tokens.expected``.
        """
        (num_tokens, num_choices), ids = id_tK.shape, tokens.id_format
        message_CW = cls._message(tokens.expected, tokens, num_tokens, id_tK.device)
        message_CW[:, 0].masked_fill_(is_bad, BAD)
        id_CI = message_CW[:, 1 : 1 + num_tokens * ids.steps].view(ids.dtype)
        id_CI.view(message_CW.shape[0], num_tokens, ids.ids_of_token)[:, :, :num_choices] = id_tK
        return cls(start_gather(message_CW, tokens.message_steps, group), tokens)

    @classmethod
    def refuse(
        cls, word: int, tokens: GroupTokens, num_tokens: int, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        """The part in the exchange of a rank that has no ids: its word, and ids that mean nothing."""
        message_CW = cls._message(word, tokens, num_tokens, device)
        cls(start_gather(message_CW, tokens.message_steps, group), tokens).wait()

    @staticmethod
    def _message(word: int, tokens: GroupTokens, num_tokens: int, device: torch.device) -> Tensor:
        """A message of this word, wherever one looks, for each copy that is sent."""
        copies = copies_sent(tokens.message_steps, device.type)
        steps = tokens.id_format.sent_steps(num_tokens, device.type)
        return torch.full((copies, steps), word, dtype=STEP, device=device)

    def wait(self) -> tuple[Tensor, Tensor]:
        """(G, K) ids of the group's tokens, in the order of ``tokens``, for tables (:meth:`IdFormat.table`); and the
        words of all ranks, (ranks,)."""
        tokens, ids = self.tokens, self.tokens.id_format
        # A peer that believes in more experts is found out by its word, after these ids have been used as indices.
        steps = self.pending.wait().index_select(0, tokens.step_of_ids_and_words)
        steps_GS, word_P = steps.split_with_sizes([tokens.token_of_G.shape[0] * ids.steps, len(tokens.message_steps)])
        id_GK = steps_GS.view(ids.dtype).view(-1, ids.ids_of_token)[:, : tokens.num_choices]
        return id_GK.to(torch.int64), word_P
