"""The routing exchange: every rank's expert ids on every rank of the group, in one collective of known size.

The sharding says how many tokens each peer holds, so nothing has to be asked first. Each message starts with one
word: a digest of what its sender believes (sharding, experts, choices, width), or BAD. All ranks read the same words,
so all of them see that something is wrong, and only then trade sentences about it: one rank's mistake is the same
error everywhere, and nobody waits for a peer that left.
"""

from collections import defaultdict
from typing import NoReturn
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import exchange_rows
from .partition import Partition
from .sharding import TokenSharding

BAD = -1
WORD_BYTES = 8
SENTENCE_BYTES = 1024


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


def digest(facts: str) -> int:
    """A non-negative word that differs (but for one case in 2**32) where ``facts`` differ."""
    return crc32(facts.encode())


def raise_on_every_rank(problem: str, facts: str, *, device: torch.device, group: dist.ProcessGroup) -> NoReturn:
    """Trade sentences and raise the same ValueError on every rank. All ranks call it, after they saw the same words.

    Args:
        problem: what is wrong on this rank; empty where nothing is.
        facts: what this rank believes about the call.
    """
    sentence = (problem or facts).encode()[: SENTENCE_BYTES - 1]
    line = torch.zeros(SENTENCE_BYTES, dtype=torch.uint8)
    line[0] = bool(problem)
    line[1 : len(sentence) + 1] = torch.frombuffer(bytearray(sentence), dtype=torch.uint8)
    counts = (SENTENCE_BYTES,) * group.size()
    lines = exchange_rows(line.to(device).repeat(group.size()), counts, counts, group).cpu().view(-1, SENTENCE_BYTES)
    problems: list[str] = []
    ranks_of_facts: dict[str, list[int]] = defaultdict(list)
    for rank, received in enumerate(lines):
        text = bytes(received[1:].tolist()).rstrip(b"\0").decode(errors="replace")
        if received[0]:
            problems.append(f"rank {rank}: {text}")
        else:
            ranks_of_facts[text].append(rank)
    if problems:
        raise ValueError("; ".join(problems))
    told = "; ".join(f"rank{'s' * (len(ranks) > 1)} {ranks}: {text}" for text, ranks in ranks_of_facts.items())
    raise ValueError(
        f"the ranks disagree about one plan ({told}); every rank of the group has to pass the same values"
    )
