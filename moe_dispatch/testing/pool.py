"""Run a function on several ranks of one machine, in milliseconds and without torchrun: for anybody's tests.

    def total(rank: int, scale: float) -> float:  # importable: at the top level of a module
        x = torch.tensor(scale * rank)
        dist.all_reduce(x)
        return x.item()

    assert run_ranks(total, 3, 10.0) == [30.0, 30.0, 30.0]

Processes are spawned once per number of ranks and wait for the next case. Nothing waits for ever: an exception, a
death or a time-out on one rank ends the case on all of them, and the next case has fresh ranks. Linux only.
"""

import atexit
import functools
import pickle
import sys
from collections.abc import Callable
from typing import Any, Self, TypeVar

from .call import check_call, check_main, name_of
from .processes.team import Team

T = TypeVar("T")


class RankPool:
    """Live ranks of any number of sizes. A context manager, or close it. Not for several threads at once."""

    def __init__(self) -> None:
        self._teams: dict[int, Team] = {}
        self._closed = False

    def run(self, fn: Callable[..., T], ranks: int, *args: Any, timeout: float = 60) -> list[T]:
        """Call ``fn`` on each of ``ranks`` ranks, in their default process group; return the results by rank.

        Args:
            fn: anything importable by name. Called as ``fn(*args)``, or as ``fn(rank, *args)`` where its first
                parameter is named ``rank``: by name, as pytest passes fixtures. torch is seeded with 0 before.
            ranks: size of the default (gloo) process group. The same processes serve every case of this size,
                so what ``fn`` leaves behind (module state) is there in the next. Groups are not: all but the default
                one are destroyed, also those behind a DeviceMesh.
            args: the same for every rank. Arguments and results are pickled, tensors included.
            timeout: seconds for the call. Spawning, before a size's first call, may take as long, and at least 120 s.

        Raises:
            ValueError: an argument that cannot work. Nothing was sent; the ranks live on.
            RankError: a rank raised, died, or returned what cannot be pickled. All ranks were ended.
            RankTimeout: a rank did not finish within ``timeout``. All ranks were ended.
        """
        if self._closed:
            raise ValueError("this RankPool is closed; a closed pool runs nothing: make a new one")
        check_call(ranks, timeout)
        check_main(fn)
        case = _pickle_case(fn, args)
        team = self._teams.pop(ranks, None) or Team(ranks)
        try:
            team.start(timeout)
            results = team.run(name_of(fn), case, timeout)
        except BaseException:  # KeyboardInterrupt too. Their group may hold half a collective: not again
            team.end()
            raise
        self._teams[ranks] = team
        return results

    def close(self) -> None:
        """End all ranks. A second call does nothing."""
        self._closed = True
        for team in self._teams.values():
            team.dismiss()  # all at once: to leave takes a second or two
        while self._teams:
            self._teams.popitem()[1].end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_ranks(fn: Callable[..., T], ranks: int, *args: Any, timeout: float = 60) -> list[T]:
    """:meth:`RankPool.run` in a pool that this process keeps until it exits."""
    return _shared_pool().run(fn, ranks, *args, timeout=timeout)


# The one deliberate piece of process state: spawning takes seconds and a case milliseconds, so callers that
# share nothing but the process share its ranks. Whoever wants ranks of their own makes a RankPool.
@functools.cache
def _shared_pool() -> RankPool:
    pool = RankPool()
    atexit.register(pool.close)
    return pool


def _pickle_case(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """What each rank is sent: our sys.path, to which pytest adds after the spawn, then fn and args."""
    try:
        return pickle.dumps((sys.path, pickle.dumps((fn, args))))
    except Exception as error:
        raise ValueError(
            f"{fn!r} with its args cannot be sent to a rank ({error}); a rank imports the function by name and "
            "unpickles the args: define it with `def` at the top of a module, and pass plain values and tensors"
        ) from error
