"""The routing exchange: every rank's expert ids on every rank of the group, in one collective of known size.

The sharding says how many tokens each peer holds, so nothing has to be asked first. Each message starts with the
status word of ``agreement.py``.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import exchange_rows
from .partition import Partition
from .sharding import TokenSharding

WORD_BYTES = 8


def exchange_routing(
    expert_tK: Tensor, word: Tensor, *, sharding: TokenSharding, experts: Partition, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Trade expert ids and status words.

    Args:
        expert_tK: (t, K) int64, -1 or an expert id; anything where ``word`` is BAD.
        word: () int64, this rank's digest or BAD.

    Returns:
        (G, K) int64 ids of the group's tokens, rank after rank, and (ranks,) int64 words.
    """
    # One id takes one byte while 0 ("no expert") and E ids fit in it, else two.
    id_dtype = torch.uint8 if experts.total <= 255 else torch.int16
    ids_tK = (expert_tK.clamp(-1, experts.total - 1) + 1).to(id_dtype)
    message = torch.cat([word.view(1).view(torch.uint8), ids_tK.view(-1).view(torch.uint8)])
    choice_bytes = expert_tK.shape[1] * id_dtype.itemsize
    received = [WORD_BYTES + tokens * choice_bytes for tokens in sharding.local_sizes]
    messages = exchange_rows(
        message.repeat(sharding.num_ranks), (message.numel(),) * sharding.num_ranks, received, group
    ).split(received)
    word_P = torch.cat([part[:WORD_BYTES] for part in messages]).view(torch.int64)
    ids_GK = torch.cat([part[WORD_BYTES:] for part in messages]).view(id_dtype).view(-1, expert_tK.shape[1])
    return ids_GK.to(torch.int64) - 1, word_P
