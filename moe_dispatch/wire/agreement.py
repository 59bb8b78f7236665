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


def agree(facts: str, *, device: torch.device, group: dist.ProcessGroup, problem: str = "") -> None:
    """Raise the same ValueError on every rank of ``group`` unless all of them pass the same ``facts``.

    One exchange of 8 bytes per pair of ranks, whatever the facts, so that nothing that a rank has wrong can break it:
    what the exchanges of a layer cannot tell, since a rank that believes in other sizes *sends* other sizes. Once per
    batch is enough, e.g. ``agree(f"{sharding}, {x_BlD.dtype}", device=x_BlD.device, group=group)``.

    Args:
        facts: what this rank believes, as text.
        device: that the group communicates on.
        problem: what is wrong on this rank, raised on all; empty where nothing is.
    """
    mine = BAD if problem else digest(facts)
    ones = (1,) * group.size()
    words = exchange_rows(torch.full((group.size(),), mine, device=device), ones, ones, group)
    if problem or set(words.tolist()) != {mine}:
        raise_on_every_rank(problem, facts, device=device, group=group)


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
        f"the ranks disagree about one call ({told}); every rank of the group has to pass the same values"
    )
