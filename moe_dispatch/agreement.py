"""One rank's mistake is everyone's error.

A rank sends each peer one word with its rows: a digest of what it believes about the call, or BAD. All ranks read the
same words, so all of them see that something is wrong, and only then trade sentences about it: every rank raises the
same text, and nobody waits for a peer that left.
"""

from collections import defaultdict
from typing import NoReturn
from zlib import crc32

import torch
import torch.distributed as dist

from .exchange import exchange_rows

BAD = -1
SENTENCE_BYTES = 16384  # the facts of a sharding over 1000 ranks


def digest(facts: str) -> int:
    """A non-negative word that differs (but for one case in 2**32) where ``facts`` differ."""
    return crc32(facts.encode())


def raise_on_every_rank(problem: str, facts: str, *, device: torch.device, group: dist.ProcessGroup) -> NoReturn:
    """Trade sentences and raise the same ValueError on every rank. All ranks call it, after they saw the same words.

    Args:
        problem: what is wrong on this rank; empty where nothing is.
        facts: what this rank believes about the call.
    """
    sentence = (problem or facts or "nothing to say").encode()[: SENTENCE_BYTES - 1]
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
