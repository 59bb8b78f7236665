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
import faulthandler
import functools
import inspect
import math
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

START_SECONDS = 120.0  # to spawn: each rank imports torch, 2 s on idle cores and many times that on busy ones
GRACE_SECONDS = 0.3  # from the first failure to the end of the case: ranks that fail alike take milliseconds
STACK_SECONDS = 2.0  # for ranks to write where they stand: milliseconds, unless the machine is out of cores
END_SECONDS = 5.0  # for ranks to leave: 0.2 s, but for ever where gloo waits for a collective that its peer left


class RankError(RuntimeError):
    """A rank raised or died. The message has exit codes, then tracebacks, the first to fail first."""


class RankTimeout(RankError):
    """A rank did not finish in time. The message has the place where each rank stood."""


class RankPool:
    """Live ranks of any number of sizes. A context manager, or close it. Not for several threads at once."""

    def __init__(self) -> None:
        self._teams: dict[int, _Team] = {}
        self._closed = False

    def run(self, fn: Callable[..., T], ranks: int, *args: Any, timeout: float = 60) -> list[T]:
        """Call ``fn`` on each of ``ranks`` ranks, in their default process group; return the results by rank.

        Args:
            fn: anything importable by name. Called as ``fn(*args)``, or as ``fn(rank, *args)`` where its first
                parameter is named ``rank``: by name, as pytest passes fixtures. torch is seeded with 0 before.
            ranks: size of the default (gloo) process group. The same processes serve every case of this size,
                so what ``fn`` leaves behind (groups, module state) is there in the next.
            args: the same for every rank. Arguments and results are pickled, tensors included.
            timeout: seconds for the call. Spawning, before a size's first call, has its own limit (120 s).

        Raises:
            ValueError: an argument that cannot work. Nothing was sent; the ranks live on.
            RankError: a rank raised, died, or returned what cannot be pickled. All ranks were ended.
            RankTimeout: a rank did not finish within ``timeout``. All ranks were ended.
        """
        self._check(ranks, timeout)
        name, case = getattr(fn, "__qualname__", repr(fn)), _pickle_case(fn, args)
        team = self._teams.pop(ranks, None) or _Team(ranks)
        try:
            team.start()
            results = team.run(name, case, timeout)
        except BaseException:  # KeyboardInterrupt too. Their group may hold half a collective: not again
            team.end()
            raise
        self._teams[ranks] = team
        return results

    def close(self) -> None:
        """End all ranks. A second call does nothing."""
        self._closed = True
        while self._teams:
            self._teams.popitem()[1].end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, ranks: int, timeout: float) -> None:
        if self._closed:
            raise ValueError("this RankPool is closed; a closed pool runs nothing: make a new one")
        if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
            raise ValueError(f"ranks is {ranks!r}; it has to be an int of at least 1: run(fn, ranks, *args)")
        if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < math.inf:
            raise ValueError(f"timeout is {timeout!r}; it has to be a number of seconds above 0: timeout=60")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """What a rank answers instead of a result."""

    text: str
    when: float  # time.monotonic(), one clock for all processes


class _Team:
    """The processes of one size, seen from the parent. A rank is busy until its answer is read."""

    def __init__(self, ranks: int) -> None:
        self.size = ranks
        self.directory = tempfile.TemporaryDirectory(prefix="ranks_", ignore_cleanup_errors=True)
        self.processes: list[SpawnProcess] = []
        self.connections: list[Connection] = []
        self.busy: set[int] = set()

    def start(self) -> None:
        """Spawn the ranks, unless they live."""
        if self.processes:
            return
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            _stack_file(self.directory.name, rank).touch()
            connection, rank_connection = context.Pipe()
            args = (rank, self.size, self.directory.name, rank_connection)
            # daemon: a pool that nobody closed does not keep the parent from exiting
            process = context.Process(target=_rank_main, args=args, name=f"rank {rank}", daemon=True)
            process.start()
            rank_connection.close()  # the rank's copy is the last one now: its death closes the pipe
            self.processes.append(process)
            self.connections.append(connection)
            self.busy.add(rank)
        self._collect(f"the start of {self.size} ranks", START_SECONDS)

    def run(self, name: str, case: bytes, timeout: float) -> list[Any]:
        """Every rank's result of the case."""
        for rank, connection in enumerate(self.connections):
            self.busy.add(rank)
            with suppress(OSError):  # it died while it was idle: _collect says so
                connection.send_bytes(case)
        return self._collect(name, timeout)

    def end(self) -> None:
        """Kill the busy ranks, who may be stuck; let the others end, so that coverage in them writes its data."""
        for rank in self.busy:
            self.processes[rank].kill()
        for connection in self.connections:
            with suppress(OSError):  # it died
                connection.send_bytes(b"")
            connection.close()
        deadline = time.monotonic() + END_SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
            process.close()
        self.directory.cleanup()

    def _collect(self, name: str, timeout: float) -> list[Any]:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while self.busy:
            connections = {self.connections[rank]: rank for rank in self.busy}
            ready = wait(list(connections), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [rank for connection, rank in connections.items() if connection in ready]:
                answers[rank] = self._receive(rank)
                if isinstance(answers[rank], _Failure):
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        failures = [answer for answer in answers.values() if isinstance(answer, _Failure)]
        if failures:
            raise RankError(self._failure_message(name, failures))
        if self.busy:
            raise RankTimeout(self._timeout_message(name, timeout))
        return [answers[rank] for rank in range(self.size)]

    def _receive(self, rank: int) -> Any:
        process = self.processes[rank]
        try:
            answer = self.connections[rank].recv_bytes()
        except (EOFError, OSError):
            process.join(END_SECONDS)
            text = f"rank {rank} died with exit code {process.exitcode}\n{self._stack(rank)}".rstrip()
            # Time 0 puts it first: a peer that lost its connection to it may raise before we see the death.
            answer = pickle.dumps(_Failure(text=text, when=0.0))
        self.busy.discard(rank)
        return pickle.loads(answer)

    def _failure_message(self, name: str, failures: list[_Failure]) -> str:
        fact = f"{name} failed on {len(failures)} of {self.size} ranks"
        if self.busy:
            fact += f"; ranks {sorted(self.busy)} had not finished, and were killed"
        failures = sorted(failures, key=lambda failure: failure.when)
        return "\n\n".join([fact, *(failure.text for failure in failures)])

    def _timeout_message(self, name: str, timeout: float) -> str:
        self._ask_for_stacks()
        fact = f"{name} did not finish within {timeout:g} s on ranks {sorted(self.busy)} of {self.size}"
        places = [f"rank {rank} finished" for rank in range(self.size)]
        for rank in self.busy:
            places[rank] = f"rank {rank} stood at\n{self._stack(rank) or '  (no answer)'}"
        return "\n\n".join([f"{fact}; if it is only slow, pass a longer timeout=", *places])

    def _ask_for_stacks(self) -> None:
        """Have the busy ranks write where they stand, in Python or in a collective; return once they have."""
        for process in (self.processes[rank] for rank in self.busy):
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + STACK_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.02)
            if all(__file__ in _stack_file(self.directory.name, rank).read_text() for rank in self.busy):
                return  # most recent call first: once our own frames are there, theirs are

    def _stack(self, rank: int) -> str:
        """The traceback that the rank wrote, most recent call first, without our own frames; may be empty."""
        return _stack_file(self.directory.name, rank).read_text().split(f'  File "{__file__}"')[0].rstrip()


def _stack_file(directory: str, rank: int) -> Path:
    return Path(directory, f"stack_{rank}")


def _rank_main(rank: int, ranks: int, directory: str, connection: Connection) -> None:
    """The life of a rank: join the group, then answer cases until an empty one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all; the parent ends its ranks
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with _stack_file(directory, rank).open("w") as stack_file:
        faulthandler.enable(stack_file, all_threads=False)
        faulthandler.register(signal.SIGUSR1, stack_file, all_threads=False)
        with suppress(EOFError, BrokenPipeError):  # the parent died, or dropped its pool
            connection.send_bytes(_answer(rank, _join_group, rank, ranks, directory))
            while case := connection.recv_bytes():
                connection.send_bytes(_answer(rank, _run_case, rank, case))
            if dist.is_initialized():  # not after a start that failed
                dist.destroy_process_group()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _join_group(rank: int, ranks: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    limit = timedelta(minutes=30)  # the pool's time-out comes first, and tells where each rank stood
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=limit)


def _run_case(rank: int, case: bytes) -> Any:
    sys.path[:], call = pickle.loads(case)
    fn, args = pickle.loads(call)
    torch.manual_seed(0)
    return fn(rank, *args) if _takes_rank(fn) else fn(*args)


def _takes_rank(fn: Callable[..., Any]) -> bool:
    try:
        return next(iter(inspect.signature(fn).parameters), None) == "rank"
    except ValueError:  # some builtins have no signature, e.g. time.sleep
        return False


def _answer(rank: int, work: Callable[..., Any], *args: Any) -> bytes:
    """The pickled result of the work, or the pickled _Failure."""
    try:
        return pickle.dumps(work(*args))
    except BaseException as error:  # pytest.fail and sys.exit raise no Exception
        text = f"rank {rank} raised\n{''.join(traceback.format_exception(error)).rstrip()}"
        return pickle.dumps(_Failure(text=text, when=time.monotonic()))
