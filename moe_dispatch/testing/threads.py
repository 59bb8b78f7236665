"""Run a function on many ranks that are threads of this process: for numerics, at 64 ranks too.

    with RankThreads() as threads:
        assert threads.run(total, 64, 10.0) == [20160.0] * 64

One rank runs at a time, in rank order, until it waits for a collective. So a run is the same every time.
"""

import copy
import ctypes
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self, TypeVar

import torch

from .call import check_call, name_of, takes_rank
from .errors import Failure, failure_of, out_of_time, rank_error, rank_timeout
from .thread_group import Rooms, ThreadGroup
from .turns import Stopped, Turns
from .worlds import BACKEND, Worlds, world_per_thread

T = TypeVar("T")

GRACE_SECONDS = 5.0  # from the first failure to the end of the run: the other ranks get their turn, to fail alike
END_SECONDS = 1.0  # for ranks to leave: at once, but for one that runs, which may never return to us


class RankThreads:
    """Ranks as threads: the interface of RankPool. A context manager, or close it."""

    backend = BACKEND

    def __init__(self) -> None:
        self._closed = False

    def run(self, fn: Callable[..., T], ranks: int, *args: Any, timeout: float = 60) -> list[T]:
        """Call ``fn`` on each of ``ranks`` ranks, in their default process group; return the results by rank.

        Args:
            fn: any function. Called as ``fn(*args)``, or as ``fn(rank, *args)`` where its first parameter is named
                ``rank``: by name, as pytest passes fixtures. torch is seeded with 0 before, on each rank.
            ranks: size of the default process group.
            args: the same for every rank: each gets a deep copy. What ``fn`` reaches otherwise is shared.
            timeout: seconds for the call.

        Raises:
            ValueError: an argument that cannot work, or a run inside a run.
            RankError: a rank raised. All ranks were ended.
            RankTimeout: a rank did not finish within ``timeout``, or never can, as all wait for each other. A rank
                that never waits cannot be ended; its thread is left behind.
        """
        if self._closed:
            raise ValueError("this RankThreads is closed; what is closed runs nothing: make a new one")
        check_call(ranks, timeout)
        calls = [_copy_call(fn, args) for _ in range(ranks)]
        with world_per_thread() as worlds, _process_as_before():
            return _Run(name_of(fn), calls, worlds, self).results(timeout)

    def _group_of(self, rank: int, ranks: int, turns: Turns, rooms: Rooms) -> ThreadGroup:
        """The default group of a rank."""
        return ThreadGroup("0", range(ranks), rank, turns, rooms)

    def close(self) -> None:
        """Run nothing any more. No thread is kept between two runs."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _copy_call(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    try:
        return copy.deepcopy((fn, args))
    except Exception as error:
        raise ValueError(
            f"{fn!r} with its args cannot be copied for a rank ({error}); every rank gets a deep copy: pass plain "
            "values and tensors without history, and make process groups and the like inside the function"
        ) from error


@contextmanager
def _process_as_before() -> Iterator[None]:
    """What ranks change for the whole process, put back."""
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.set_rng_state(random_state)
        torch.set_num_threads(threads)


class _Run:
    """One call of ``run``: its threads, and their answers."""

    def __init__(
        self,
        name: str,
        calls: list[tuple[Callable[..., Any], tuple[Any, ...]]],
        worlds: Worlds,
        made_by: RankThreads,
    ) -> None:
        self.name, self.size, self.worlds, self.made_by = name, len(calls), worlds, made_by
        self.turns, self.rooms = Turns(self.size), Rooms()
        self.arriving: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self.answers: dict[int, Any] = {}
        self.threads = [
            threading.Thread(target=self._live, args=(rank, *call), name=f"rank {rank}", daemon=True)
            for rank, call in enumerate(calls)
        ]

    def results(self, timeout: float) -> list[Any]:
        """Every rank's result."""
        for thread in self.threads:
            thread.start()
        try:
            self.turns.start()
            return self._collect(timeout)
        finally:
            self._end()

    def _collect(self, timeout: float) -> list[Any]:
        answers = self.answers
        deadline = time.monotonic() + timeout
        with suppress(queue.Empty):
            while len(answers) < self.size:
                rank, answer = self.arriving.get(timeout=max(0.0, deadline - time.monotonic()))
                answers[rank] = answer
                if isinstance(answer, Failure):
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        failures = [answer for answer in answers.values() if isinstance(answer, Failure)]
        busy = [rank for rank in range(self.size) if answers.get(rank, Stopped) is Stopped]
        if failures:
            unfinished = f"ranks {busy} had not finished, and were stopped" if busy else ""
            raise rank_error(self.name, self.size, failures, unfinished)
        if self.turns.stuck:
            fact = (
                f"{self.name} cannot finish: each of ranks {busy} of {self.size} waits for a rank that does not come"
            )
            raise rank_timeout(fact, self.size, self.turns.stuck)
        if busy:
            raise out_of_time(self.name, self.size, self.turns.stacks(busy), timeout)
        return [answers[rank] for rank in range(self.size)]

    def _end(self) -> None:
        """Have every thread end that can."""
        if len(self.answers) < self.size:
            holder = self.turns.abandon()
            if holder is not None and (number := self.threads[holder].ident):
                # Raises at its next line of Python; a rank in a sleep or in C code goes on until it returns from it.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(number), ctypes.py_object(Stopped))
        deadline = time.monotonic() + END_SECONDS
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _live(self, rank: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """The life of a rank: one call."""
        with suppress(Stopped):  # the run may end while this rank does
            try:
                self.turns.enter(rank)
                group = self.made_by._group_of(rank, self.size, self.turns, self.rooms)
                with self.worlds.of(group, self.made_by.backend):
                    answer = fn(rank, *args) if takes_rank(fn) else fn(*args)
            except Stopped:
                answer = Stopped
            except BaseException as error:  # pytest.fail and sys.exit raise no Exception
                answer = failure_of(rank, error)
            self.turns.leave(rank)
            # Last: a run whose answers are all there stops nobody, and a time-out before stops who has the turn.
            self.arriving.put((rank, answer))
