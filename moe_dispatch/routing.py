"""The routing exchange: every rank's expert ids on every rank of the group, in one collective of known size.

The sharding says how many tokens each peer holds, so nothing has to be asked first. Each message starts with the
status word of ``agreement.py``. A token's ids take a multiple of 4 bytes: ranks with another K, within the same
step, still send what their peers expect, and are told apart by their words instead of breaking the backend.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import exchange_rows
from .partition import Partition
from .sharding import TokenSharding

# 4 bytes of status and ids in steps of 4 bytes: never more than 2 K + 8 bytes for each token and rank.
WORD = torch.int32
WORDS = 2**31 - 1
STEP_BYTES = 4


def exchange_routing(
    expert_tK: Tensor, word: Tensor, *, sharding: TokenSharding, experts: Partition, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Trade expert ids and status words.

    Args:
        expert_tK: (t, K) int64, -1 or an expert id; anything where ``word`` is BAD.
        word: () int64, this rank's digest, below WORDS, or BAD.

    Returns:
        (G, K) int64 ids of the group's tokens, rank after rank, and (ranks,) int64 words.
    """
    # One id takes one byte while 0 ("no expert") and E ids fit in it, else two.
    id_dtype = torch.uint8 if experts.total <= 255 else torch.int16
    tokens, num_choices = expert_tK.shape
    slots = -(-num_choices * id_dtype.itemsize // STEP_BYTES) * STEP_BYTES // id_dtype.itemsize
    ids_tS = torch.zeros(tokens, slots, dtype=id_dtype, device=expert_tK.device)
    ids_tS[:, :num_choices] = expert_tK.clamp(-1, experts.total - 1) + 1
    message = torch.cat([word.to(WORD).view(1).view(torch.uint8), ids_tS.view(-1).view(torch.uint8)])
    received = [WORD.itemsize + size * slots * id_dtype.itemsize for size in sharding.local_sizes]
    messages = exchange_rows(
        message.repeat(sharding.num_ranks), (message.numel(),) * sharding.num_ranks, received, group
    ).split(received)
    word_P = torch.cat([part[: WORD.itemsize] for part in messages]).view(WORD).to(torch.int64)
    ids_GS = torch.cat([part[WORD.itemsize :] for part in messages]).view(id_dtype).view(-1, slots)
    return ids_GS[:, :num_choices].to(torch.int64) - 1, word_P
