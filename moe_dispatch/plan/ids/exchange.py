"""The exchange of a plan: every rank's expert ids on every rank of the group, in one collective of known size.

The sharding says how many tokens each peer holds, so nothing has to be asked first. Each message starts with the
sender's word.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ...wire.exchange import FinishedExchange, PendingExchange, copies_sent, start_gather
from .format import STEP
from .group_tokens import GroupTokens


@dataclass(frozen=True, slots=True)
class IdsExchange:
    """The exchange on its way."""

    pending: PendingExchange | FinishedExchange
    tokens: GroupTokens

    @classmethod
    def start(cls, id_tK: Tensor, word: Tensor, tokens: GroupTokens, group: dist.ProcessGroup) -> "IdsExchange":
        """Send expert ids and a word to every rank.

        Args:
            id_tK: (t, K), an expert id plus one, or 0 for "no expert"; anything where ``word`` is no digest.
            word: () int64, ``tokens.expected``, or what tells of a problem.
        """
        (num_tokens, num_choices), ids = id_tK.shape, tokens.id_format
        device, copies = id_tK.device, copies_sent(tokens.message_steps, id_tK.device.type)
        message_CW = torch.zeros(copies, ids.sent_steps(num_tokens, device.type), dtype=STEP, device=device)
        message_CW[:, 0] = word
        id_CI = message_CW[:, 1 : ids.message_steps(num_tokens)].view(ids.dtype)
        id_CI.view(copies, num_tokens, ids.ids_of_token)[:, :, :num_choices] = id_tK
        return cls(start_gather(message_CW, tokens.message_steps, group), tokens)

    @classmethod
    def refuse(
        cls, word: int, tokens: GroupTokens, num_tokens: int, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        """The part in the exchange of a rank that has no ids: its word, and ids that mean nothing."""
        word_on_device = torch.full((), word, dtype=torch.int64, device=device)
        none_tK = torch.zeros_like(word_on_device).expand(num_tokens, tokens.num_choices)
        cls.start(none_tK, word_on_device, tokens, group).wait()

    def wait(self) -> tuple[Tensor, Tensor]:
        """(G, K) ids plus one of the group's tokens, in the order of ``tokens``, 0 for "no expert", none above E; and
        the words of all ranks, (ranks,) int64."""
        tokens, steps = self.tokens, self.pending.wait()
        ids = tokens.id_format
        id_GK = steps.index_select(0, tokens.step_of_ids_GS).view(ids.dtype)
        id_GK = id_GK.view(len(tokens.token_of_G), ids.ids_of_token)[:, : tokens.num_choices]
        # A peer that believes in more experts is found out by its word, after these ids have been used as indices.
        id_GK = id_GK.to(torch.int64).clamp_(0, tokens.num_experts)
        return id_GK, steps.index_select(0, tokens.step_of_word_P).to(torch.int64)
