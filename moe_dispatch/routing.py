"""The routing exchange: every rank's expert ids on every rank of the group, in one collective of known size.

The sharding says how many tokens each peer holds, so nothing has to be asked first. Each message starts with the
status word of ``agreement.py``. A token's ids take a multiple of 4 bytes: ranks with another K, within the same
step, still send what their peers expect, and are told apart by their words instead of breaking the backend.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import Arrived, Transfer, start_exchange
from .grid import Grid
from .partition import Partition
from .sharding import TokenSharding

# 4 bytes of status and ids in steps of 4 bytes: never more than 2 K + 8 bytes for each token and rank.
WORD = torch.int32
WORDS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingExchange:
    """The exchange on its way."""

    transfer: Transfer | Arrived
    grid: Grid
    num_choices: int
    id_dtype: torch.dtype

    @classmethod
    def start(
        cls, expert_tK: Tensor, word: Tensor, *, sharding: TokenSharding, experts: Partition, group: dist.ProcessGroup
    ) -> "RoutingExchange":
        """Send expert ids and a status word to every rank.

        Args:
            expert_tK: (t, K) int64, -1 or an expert id; anything where ``word`` is BAD.
            word: () int64, this rank's digest, below WORDS, or BAD.
        """
        # One id takes one byte while 0 ("no expert") and E ids fit in it, else two.
        id_dtype = torch.uint8 if experts.total <= 255 else torch.int16
        tokens, num_choices = expert_tK.shape
        steps = -(-num_choices * id_dtype.itemsize // WORD.itemsize)
        message = torch.zeros(1 + tokens * steps, dtype=WORD, device=expert_tK.device)
        message[0] = word
        message[1:].view(tokens, steps).view(id_dtype)[:, :num_choices] = expert_tK + 1
        ranks, received = sharding.num_ranks, [1 + size * steps for size in sharding.local_sizes]
        transfer = start_exchange(message.repeat(ranks), (len(message),) * ranks, received, group)
        grid = Grid.of(sharding, experts, steps, message.device)
        return cls(transfer=transfer, grid=grid, num_choices=num_choices, id_dtype=id_dtype)

    def wait(self) -> tuple[Tensor, Tensor]:
        """(G, K) ids plus one of the group's tokens, rank after rank, 0 for "no expert"; (ranks,) int64 words."""
        words = self.transfer.wait()
        ids_GK = words[self.grid.step_GS].view(self.id_dtype)[:, : self.num_choices]
        return ids_GK.to(torch.int64), words[self.grid.status_P].to(torch.int64)
