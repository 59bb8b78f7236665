"""The routing exchange: every rank's expert ids on every rank of the group, in one collective of known size.

The sharding says how many tokens each peer holds, so nothing has to be asked first. Each message starts with the
status word of ``agreement.py``. A token's ids take a multiple of 4 bytes: ranks with another K, within the same
step, still send what their peers expect, and are told apart by their words instead of breaking the backend.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..wire.exchange import Arrived, Transfer, start_exchange
from .group_tokens import WORD, Grid


@dataclass(frozen=True, slots=True)
class RoutingExchange:
    """The exchange on its way."""

    transfer: Transfer | Arrived
    grid: Grid

    @classmethod
    def start(cls, id_tK: Tensor, word: Tensor, grid: Grid, group: dist.ProcessGroup) -> "RoutingExchange":
        """Send expert ids and a status word to every rank.

        Args:
            id_tK: (t, K), an expert id plus one, or 0 for "no expert"; anything where ``word`` is BAD.
            word: () int64, ``grid.expected`` or BAD.
        """
        ranks, (tokens, num_choices) = len(grid.received), id_tK.shape
        message_PW = torch.zeros(ranks, 1 + tokens * grid.steps, dtype=WORD, device=id_tK.device)
        message_PW[:, 0] = word
        message_PW[:, 1:].view(grid.id_dtype).view(ranks, tokens, grid.ids_of_token)[:, :, :num_choices] = id_tK
        transfer = start_exchange(message_PW.view(-1), (message_PW.shape[1],) * ranks, grid.received, group)
        return cls(transfer, grid)

    def wait(self) -> tuple[Tensor, Tensor]:
        """(G, K) ids plus one of the group's tokens, in the order of the grid, 0 for "no expert", none above E; and
        the words of all ranks, (ranks,) int64."""
        grid, words = self.grid, self.transfer.wait()
        id_GK = words.index_select(0, grid.step_GS).view(grid.id_dtype).view(len(grid.token_of_G), grid.ids_of_token)
        # A peer that believes in more experts is found out by its word, after these ids have been used as indices.
        id_GK = id_GK[:, : grid.num_choices].to(torch.int64).clamp_(0, grid.num_experts)
        return id_GK, words.index_select(0, grid.status_P).to(torch.int64)
