"""The ranks of one size that are processes, seen from their parent."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from ..errors import Failure, out_of_time, rank_error
from . import reaper
from .rank_process import DESTROY_GROUPS, OWN_FRAME, rank_main, stack_file

START_SECONDS = 120.0  # to spawn: each rank imports torch, 2 s on idle cores and many times that on busy ones
GRACE_SECONDS = 0.3  # from the first failure to the end of the case: ranks that fail alike take milliseconds
STACK_SECONDS = 2.0  # for ranks to write where they stand: milliseconds, unless the machine is out of cores
END_SECONDS = 15.0  # for ranks to leave: 0.2 s, 6 s where 18 write coverage; for ever where gloo waits for a peer


IMPORT_FAILED = (
    "before it could begin: a rank first imports the script that started it, and the error of that is printed above. "
    'If it is about "bootstrapping", put the calls of the script under `if __name__ == "__main__":`'
)


class Team:
    """A rank is busy until its answer is read."""

    def __init__(self, ranks: int) -> None:
        self.size = ranks
        self.directory = tempfile.TemporaryDirectory(prefix="ranks_", ignore_cleanup_errors=True)
        self.processes: list[SpawnProcess] = []
        self.connections: list[Connection] = []
        self.busy: set[int] = set()
        self.reaper: subprocess.Popen[str] | None = None
        self.started = False

    def start(self, timeout: float) -> None:
        """Spawn the ranks, unless they live, within START_SECONDS, or ``timeout`` if that is longer."""
        if self.processes:
            return
        self.reaper = _start_reaper(self.directory.name)
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            stack_file(self.directory.name, rank).touch()
            connection, rank_connection = context.Pipe()
            args = (rank, self.size, self.directory.name, rank_connection)
            # daemon: a pool that nobody closed does not keep the parent from exiting
            process = context.Process(target=rank_main, args=args, name=f"rank {rank}", daemon=True)
            process.start()
            print(process.pid, file=self.reaper.stdin, flush=True)
            rank_connection.close()  # the rank's copy is the last one now: its death closes the pipe
            self.processes.append(process)
            self.connections.append(connection)
            self.busy.add(rank)
        self._collect(f"the start of {self.size} ranks", max(START_SECONDS, timeout))
        self.started = True

    def run(self, name: str, case: bytes, timeout: float) -> list[Any]:
        """Every rank's result of the case. The groups that it made are destroyed."""
        answers = self._ask(case, name, timeout)
        if any(made_groups for _, made_groups in answers):
            # Only now: a rank that destroyed its own while a peer still used it would break the peer's connection.
            self._ask(DESTROY_GROUPS, f"the end of {name}", timeout)
        return [result for result, _ in answers]

    def _ask(self, message: bytes, name: str, timeout: float) -> list[Any]:
        for rank, connection in enumerate(self.connections):
            self.busy.add(rank)
            with suppress(OSError):  # it died while it was idle: _collect says so
                connection.send_bytes(message)
        return self._collect(name, timeout)

    def dismiss(self) -> None:
        """Kill the busy ranks, who may be stuck; ask the others to leave. A second call does nothing."""
        for rank in self.busy:
            self.processes[rank].kill()
        for connection in self.connections:
            with suppress(OSError):  # it died
                connection.send_bytes(b"")
            connection.close()
        self.busy.clear()
        self.connections.clear()

    def end(self) -> None:
        """Dismiss the ranks and see them leave in order, so that coverage in them writes its data."""
        self.dismiss()
        deadline = time.monotonic() + END_SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
            process.close()
        self.directory.cleanup()
        if self.reaper:
            self.reaper.communicate()  # it finds nothing to do

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
                if isinstance(answers[rank], Failure):
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        failures = [answer for answer in answers.values() if isinstance(answer, Failure)]
        if failures:
            unfinished = f"ranks {sorted(self.busy)} had not finished, and were killed" if self.busy else ""
            raise rank_error(name, self.size, failures, unfinished)
        if self.busy:
            self._ask_for_stacks()
            raise out_of_time(name, self.size, {rank: self._stack(rank) for rank in self.busy}, timeout)
        return [answers[rank] for rank in range(self.size)]

    def _receive(self, rank: int) -> Any:
        process = self.processes[rank]
        try:
            answer = self.connections[rank].recv_bytes()
        except (EOFError, OSError):
            process.join(END_SECONDS)
            text = f"rank {rank} died with {_cause(process.exitcode)}\n{self._stack(rank)}".rstrip()
            if not self.started and process.exitcode == 1:
                text += f"\n{IMPORT_FAILED}"
            # Time 0 puts it first: a peer that lost its connection to it may raise before we see the death.
            answer = pickle.dumps(Failure(text=text, when=0.0))
        self.busy.discard(rank)
        return pickle.loads(answer)

    def _ask_for_stacks(self) -> None:
        """Have the busy ranks write where they stand, in Python or in a collective; return once they have."""
        for process in (self.processes[rank] for rank in self.busy):
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + STACK_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.02)
            if all(OWN_FRAME in stack_file(self.directory.name, rank).read_text() for rank in self.busy):
                return  # most recent call first: once our own frames are there, theirs are

    def _stack(self, rank: int) -> str:
        """The traceback that the rank wrote, most recent call first, without our own frames; may be empty."""
        return stack_file(self.directory.name, rank).read_text().split(OWN_FRAME)[0].rstrip()


def _cause(exit_code: int | None) -> str:
    """ "exit code -9 (SIGKILL)"."""
    name = f" ({signal.Signals(-exit_code).name})" if exit_code and exit_code < 0 else ""
    return f"exit code {exit_code}{name}"


def _start_reaper(folder: str) -> "subprocess.Popen[str]":
    """What ends the ranks and removes ``folder`` once this process is no more, or closes its standard input."""
    command = [sys.executable, "-I", "-S", reaper.__file__, folder]
    # In a session of its own: what is sent to all of our process group leaves it to its task.
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
