"""The ranks that a launcher started: they meet, run, and end with an error that names who is missing."""

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from threading import Thread
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from ....testing.processes.rank_process import missing_interface
from ....testing.worlds import MadeGroups
from ....wire.agreement import ranks_by_text, who_says_what
from ..exits import MAY_BE_LEFT, CouldNotRun
from .presence import MeetingPoint, Presence

T = TypeVar("T")

MOST_DIFFERENCES = 5
OWN_LIMIT = timedelta(minutes=10)  # of the backend, beyond ours, which names the missing rank


class JoinedRanks:
    """This process is one of ``size`` ranks that a launcher started.

    NCCL where there is CUDA, with gloo for tensors on the CPU, else gloo alone. What may wait for a peer runs in a
    thread of its own: a collective cannot be broken off, but it can be left alone, so that this process ends in time
    and listens to signals. Groups that a call of ``run`` makes are destroyed after it.

    Args:
        facts: what the ranks have to agree about, by name; see :func:`disagreement`.
        problem: what is wrong on this rank, an error on all; empty where nothing is.
        timeout: seconds for the ranks to meet, and for each call of ``run``.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        local_rank: int,
        point: MeetingPoint,
        facts: Mapping[str, str],
        problem: str,
        timeout: float,
    ) -> None:
        self.rank, self.size, self.local_rank, self.timeout = rank, size, local_rank, timeout
        self._point, self._brought = point, json.dumps({"problem": problem, "facts": dict(facts)})
        self._place = "the start"
        self._presence: Presence | None = None
        self._made: MadeGroups | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def at(self, place: str) -> None:
        self._place = place
        if self._presence:
            self._presence.place = place

    def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Call ``fn(*args)``.

        Raises:
            CouldNotRun: it raised on a rank, took longer than the time-out, or a rank ended or does not answer.
        """

        def call() -> T:
            result = fn(*args)
            dist.barrier()  # a rank that destroyed its groups while a peer still used them would break its connection
            if self._made:
                self._made.destroy()
            return result

        return self._in_time(call)

    def __enter__(self) -> Self:
        try:
            self.at("the meeting")
            self._in_time(self._meet)
            self.at("the first connection")
            self._in_time(self._connect)
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        error = exception[1]
        if isinstance(error, BaseException):
            self._leave(error)
        else:
            self.at("the end")
            self._in_time(self._end)

    def _meet(self) -> None:
        store, second = self._point.open(rank=self.rank, size=self.size, timeout=self.timeout)
        presence = Presence(second, rank=self.rank, size=self.size, point=self._point)
        self._store = store
        brought = [json.loads(text) for text in presence.meet(self._brought, timeout=self.timeout)]
        presence.start()
        self._presence = presence
        if told := disagreement(brought):
            raise CouldNotRun(told)

    def _connect(self) -> None:
        if told := missing_interface(os.environ):
            raise CouldNotRun(told)
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
        limit = timedelta(seconds=self.timeout) + OWN_LIMIT
        dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.size, timeout=limit)
        self._made = MadeGroups()

    def _end(self) -> None:
        if self._presence:
            self._presence.stop()
        dist.barrier()
        dist.destroy_process_group()

    def _leave(self, error: BaseException) -> None:
        """Without touching a group: peers may still be in one."""
        if self._presence:
            told = isinstance(error, CouldNotRun | KeyboardInterrupt)
            self._presence.leave(str(error) if told else f"{type(error).__name__}: {error}")
            self._presence.see_off()

    def _in_time(self, work: Callable[[], T]) -> T:
        """The result of ``work``, which runs in a thread."""
        presence, future = self._presence, Future[T]()
        thread = Thread(target=self._work, args=(work, future), name=MAY_BE_LEFT, daemon=True)
        thread.start()
        # The meeting, which makes the presence, has limits of its own: for the connection, then for the peers.
        limit = self.timeout if presence else 2 * self.timeout + 1
        deadline = time.monotonic() + limit
        while not wait([future], 0.05).done:
            if presence and presence.someone_left():
                raise self._broken("broke off")
            if time.monotonic() > deadline:
                raise self._broken(f"did not end within {limit:g} s, which --timeout limits")
        thread.join()
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, CouldNotRun):
            raise error
        raise self._broken("failed", error) from error

    def _work(self, work: Callable[[], T], future: "Future[T]") -> None:
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(self.local_rank)  # of this thread
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    def _broken(self, what: str, error: BaseException | None = None) -> CouldNotRun:
        """Tell the peers, and find out who is to blame."""
        fact, told = f"{self._place} {what}", ""
        if self._presence:
            self._presence.leave(f"{fact} ({type(error).__name__}: {error})" if error else fact)
            told = self._presence.diagnosis() or ("" if error else self._presence.elsewhere())
        if error and not told:
            told = "".join(traceback.format_exception(error)).rstrip()
        return CouldNotRun(f"rank {self.rank}: {fact}: {told or 'all ranks live'}")


def disagreement(brought: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with what the ranks brought, the same text on each; empty where nothing is.

    Args:
        brought: of each rank, ``{"problem": text, "facts": {name: text}}``.
    """
    problems = {rank: of_rank["problem"] for rank, of_rank in enumerate(brought) if of_rank["problem"]}
    if problems:
        return who_says_what(problems)
    told = []
    for name in dict.fromkeys(name for of_rank in brought for name in of_rank["facts"]):
        fact_of_rank = {rank: of_rank["facts"].get(name, "missing") for rank, of_rank in enumerate(brought)}
        ranks_of_fact = ranks_by_text(fact_of_rank)
        if len(ranks_of_fact) > 1:
            values = ", ".join(f"{fact} on rank {ranks}" for fact, ranks in ranks_of_fact.items())
            told.append(f"{name} is {values}")
    if not told:
        return ""
    more = f"; and {len(told) - MOST_DIFFERENCES} more" if len(told) > MOST_DIFFERENCES else ""
    return f"the ranks were started differently: {'; '.join(told[:MOST_DIFFERENCES])}{more}; start all of them alike"
