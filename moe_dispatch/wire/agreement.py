"""One rank's mistake is everyone's error.

A rank sends each peer one *word* with its rows: a digest of what it believes about the call, or BAD. All ranks read
the same words, so all of them see that something is wrong, and only then exchange texts about it: every rank raises
the same text, and nobody waits for a peer that left.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn
from zlib import crc32

import torch
import torch.distributed as dist

from ..errors import DisagreementError, RankMistakeError
from .devices import carries, device_for
from .exchange import exchange_rows

BAD = -1
WORDS = 2**31 - 1  # a word fits in an int32
TEXT_BYTES = 16384  # the facts of a sharding over 1000 ranks


def digest(facts: str) -> int:
    """A word of 31 bits, not negative, that differs (but for one case in 2**31) where ``facts`` differ."""
    return crc32(facts.encode()) % WORDS


@dataclass(frozen=True, slots=True)
class Statement:
    """What this rank says about a call that all ranks of a group make.

    Attributes:
        facts: what it believes, as text: the same on every rank, or the call is refused.
        problem: what is wrong on this rank; empty where nothing is.
        cause: the exception that the problem comes from, if there is one.
    """

    facts: str
    problem: str = ""
    cause: Exception | None = None

    @property
    def expected(self) -> int:
        """The word of a rank that believes the same and has no problem."""
        return digest(self.facts)

    @property
    def word(self) -> int:
        """What this rank sends to its peers."""
        return BAD if self.problem else self.expected

    def check(self, words: Iterable[int], *, device: torch.device, group: dist.ProcessGroup) -> None:
        """Raise on every rank unless all of them sent the expected word.

        Args:
            words: those of all ranks, the same values on every rank.
            device: that the group communicates on.
        """
        if set(words) != {self.expected}:
            self.raise_on_every_rank(device=device, group=group)

    def raise_on_every_rank(self, *, device: torch.device, group: dist.ProcessGroup) -> NoReturn:
        """Exchange texts, and raise the same error on every rank. All ranks call it, after they read the same words.

        Raises:
            RankMistakeError: a rank has a problem; on such a rank from its cause.
            DisagreementError: none has, so their facts differ.
        """
        texts = exchange_texts(self.facts, self.problem, device=device, group=group)
        problem_of_rank = {rank: text for rank, (is_problem, text) in enumerate(texts) if is_problem}
        if problem_of_rank:
            told = "; ".join(f"rank {rank}: {problem}" for rank, problem in problem_of_rank.items())
            raise RankMistakeError(told, tuple(problem_of_rank)) from self.cause
        told = who_says_what({rank: facts for rank, (_, facts) in enumerate(texts)})
        raise DisagreementError(
            f"the ranks disagree about one call ({told}); every rank of the group has to pass the same values"
        )


def ranks_by_text(text_of_rank: Mapping[int, str]) -> dict[str, list[int]]:
    """Which ranks say each text, in the order of the first of them."""
    ranks_of_text: dict[str, list[int]] = defaultdict(list)
    for rank, text in text_of_rank.items():
        ranks_of_text[text].append(rank)
    return ranks_of_text


def who_says_what(text_of_rank: Mapping[int, str]) -> str:
    """Each text once, after the ranks that say it."""
    by_text = ranks_by_text(text_of_rank)
    return "; ".join(f"rank{'s' * (len(ranks) > 1)} {ranks}: {text}" for text, ranks in by_text.items())


def agree(facts: str, *, device: torch.device, group: dist.ProcessGroup, problem: str = "") -> None:
    """Raise the same error on every rank of ``group`` unless all of them pass the same ``facts``.

    One exchange of 8 bytes per pair of ranks, whatever the facts, so that nothing that a rank has wrong can break it.
    The exchanges of a layer cannot tell such mistakes: a rank that believes in other sizes *sends* other sizes. Once
    per batch is enough, e.g. ``agree(f"{sharding}, {x_BlD.dtype}", device=x_BlD.device, group=group)``.

    Args:
        facts: what this rank believes, as text.
        device: that the group communicates on.
        problem: what is wrong on this rank, raised on all; empty where nothing is.

    Raises:
        RankMistakeError: a rank passed a problem, or a device on which the group does not communicate.
        DisagreementError: the facts differ.
    """
    if not carries(group, device):
        problem = problem or f"device is {device}, where the group does not communicate"
        device = device_for([], group)
    statement, ones = Statement(facts, problem), (1,) * group.size()
    word_P = torch.full((group.size(),), statement.word, device=device)
    words = exchange_rows(word_P, ones, ones, group).tolist()
    statement.check(words, device=device, group=group)


def exchange_texts(
    facts: str, problem: str, *, device: torch.device, group: dist.ProcessGroup
) -> list[tuple[bool, str]]:
    """What each rank says: (is it a problem, the text), in rank order."""
    text = (problem or facts or "nothing to say").encode()
    if len(text) >= TEXT_BYTES:  # what differs may be in the rest
        text = text[: TEXT_BYTES - 13] + f"... {crc32(text):08x}".encode()
    line = torch.zeros(TEXT_BYTES, dtype=torch.uint8, device="cpu")
    line[0] = bool(problem)
    line[1 : len(text) + 1] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    counts = (TEXT_BYTES,) * group.size()
    lines = exchange_rows(line.to(device).repeat(group.size()), counts, counts, group).cpu().view(-1, TEXT_BYTES)
    return [
        (bool(received[0]), bytes(received[1:].tolist()).rstrip(b"\0").decode(errors="replace")) for received in lines
    ]
