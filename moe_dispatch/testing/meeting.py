"""A collective of ranks that are threads: each brings a tensor for each, and takes what the others brought for it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .turns import Turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What one rank brings.

    Attributes:
        facts: the collective, in words that are the same on all ranks, or it is refused.
        sources: the tensors that are sent.
        copies: of them, as they were when the collective began; flat.
        sent: for each rank of the group: parts of the copies.
        expected: how many numbers it counts on, from each rank.
    """

    facts: str
    sources: Sequence[Tensor]
    copies: Sequence[Tensor]
    sent: Sequence[Tensor]
    expected: Sequence[int]


@dataclass(slots=True)
class Meeting:
    """One collective of one group; complete once every rank has come."""

    ranks: Sequence[int]
    messages: dict[int, Message] = field(default_factory=dict)  # by rank in the group
    problem: str = ""

    @property
    def complete(self) -> bool:
        return len(self.messages) == len(self.ranks)

    def add(self, rank: int, message: Message) -> None:
        self.messages[rank] = message
        if self.complete:
            self.problem = self._disagreement() or self._wrong_count()

    def _disagreement(self) -> str:
        ranks_of_facts: dict[str, list[int]] = defaultdict(list)
        for rank, message in sorted(self.messages.items()):
            ranks_of_facts[message.facts].append(self.ranks[rank])
        if len(ranks_of_facts) == 1:
            return ""
        told = "; ".join(f"ranks {ranks}: {facts}" for facts, ranks in ranks_of_facts.items())
        return (
            f"the ranks of a group are in different collectives ({told}); every rank has to make the same calls, in "
            "the same order, with the same dtype"
        )

    def _wrong_count(self) -> str:
        for source, message in self.messages.items():
            for to, x in enumerate(message.sent):
                expected = self.messages[to].expected[source]
                if x.numel() != expected:
                    return (
                        f"rank {self.ranks[source]} sends {x.numel()} numbers to rank {self.ranks[to]}, which "
                        f"expects {expected}, in {message.facts}; both have to know the same count"
                    )
        return ""


@dataclass(slots=True)
class Room:
    """Where the ranks of one group meet: the n-th collective of each rank is the n-th meeting."""

    ranks: Sequence[int]
    open: dict[int, Meeting] = field(default_factory=dict)

    def join(self, number: int, rank: int, message: Message) -> Meeting:
        meeting = self.open.setdefault(number, Meeting(self.ranks))
        meeting.add(rank, message)
        if meeting.complete:
            del self.open[number]
        return meeting


class ThreadWork(dist.Work):
    """A collective that this rank has joined. What it sends was copied; what it gets is written by ``wait()``."""

    def __init__(self, turns: Turns, rank: int, meeting: Meeting, receive: Callable[[list[Tensor]], object]) -> None:
        super().__init__()
        self._turns, self._rank, self._meeting, self._receive = turns, rank, meeting, receive
        self._done = False

    def is_completed(self) -> bool:
        return self._meeting.complete

    def wait(self, timeout: Any = None) -> bool:
        """Let the other ranks run until all have joined; then write what this rank gets.

        Raises:
            RuntimeError: the ranks do not fit together (on all of them), or this rank wrote to what it sends.
        """
        meeting = self._meeting
        self._turns.wait(meeting.ranks[self._rank], lambda: meeting.complete)
        if meeting.problem:
            raise RuntimeError(meeting.problem)
        if not self._done:
            self._done = True
            with torch.no_grad():
                self._check_sources(meeting.messages[self._rank])
                self._receive([meeting.messages[source].sent[self._rank] for source in range(len(meeting.ranks))])
        return True

    def _check_sources(self, message: Message) -> None:
        """The copies hide a write to what is still on its way."""
        for source, copy in zip(message.sources, message.copies, strict=True):
            if not source.reshape(-1).view(torch.uint8).equal(copy.view(torch.uint8)):
                raise RuntimeError(
                    f"rank {self._meeting.ranks[self._rank]} wrote to what it sends in {message.facts} before "
                    "wait(); a backend may send the new values: leave it alone until wait() returns"
                )
