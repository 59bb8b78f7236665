"""Threads that take turns: one runs at a time, until it has to wait or ends. So a run is the same every time."""

import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType

import torch

OWN_FOLDER = str(Path(__file__).parent)


class Stopped(SystemExit):
    """Ends a rank of a run that is over. A SystemExit, because a thread that ends by one prints nothing."""


class Turns:
    """The turn goes round in rank order. Each rank has a random state of its own, as a process has."""

    def __init__(self, ranks: int) -> None:
        self.stuck: Mapping[int, str] = {}  # where the ranks stood when none of them could go on
        self._lock = threading.Lock()
        self._turn_of = [threading.Semaphore(0) for _ in range(ranks)]
        self._thread_of = [0] * ranks  # 0: not yet there
        self._can_go_on: dict[int, Callable[[], bool]] = dict.fromkeys(range(ranks), _at_once)  # but who has left
        self._holder: int | None = None
        self._over = False  # whoever wants to wait raises Stopped, still in turn
        self._abandoned = False  # ... and out of turn, because the rank that runs does not pass it on

    def start(self) -> None:
        """Give the first turn."""
        self._pass_on(after=-1)

    def enter(self, rank: int) -> None:
        """The first call of each rank's thread: returns at its first turn, with a random state of seed 0."""
        self._thread_of[rank] = threading.get_ident()
        self._turn_of[rank].acquire()
        if self._abandoned:
            raise Stopped
        torch.manual_seed(0)

    def wait(self, rank: int, until: Callable[[], bool]) -> None:
        """Let the others run until ``until()`` holds.

        Raises:
            Stopped: the run is over, also because no rank can go on.
        """
        if not self._over and not until():
            random_state = torch.get_rng_state()
            self._can_go_on[rank] = until
            self._pass_on(after=rank)
            self._turn_of[rank].acquire()
            if not self._abandoned:
                torch.set_rng_state(random_state)
        if self._over:
            raise Stopped

    def leave(self, rank: int) -> None:
        """The last call of each rank's thread."""
        with self._lock:
            del self._can_go_on[rank]
        self._pass_on(after=rank)

    def abandon(self) -> int | None:
        """Have all ranks that wait raise Stopped now. Returns the one that runs, which cannot be made to."""
        with self._lock:
            self._over = self._abandoned = True
            for turn in self._turn_of:
                turn.release()
            return self._holder

    def stacks(self, ranks: Iterable[int]) -> dict[int, str]:
        """Where each of ``ranks`` stands, latest call first, without frames of this folder."""
        frames = sys._current_frames()
        stack_of = {rank: _format(frames.get(self._thread_of[rank])) for rank in ranks}
        return {rank: stack or "  its first line: it had no turn yet" for rank, stack in stack_of.items()}

    def _pass_on(self, after: int) -> None:
        with self._lock:
            if self._abandoned:
                return
            in_turn = sorted(self._can_go_on, key=lambda rank: (rank <= after, rank))
            able = next((rank for rank in in_turn if self._over or self._can_go_on[rank]()), None)
            if able is None and in_turn:
                self.stuck = self.stacks(sorted(in_turn))
                self._over = True
                able = in_turn[0]
            self._holder = able
            if able is not None:
                self._can_go_on[able] = _at_once
                self._turn_of[able].release()


def _at_once() -> bool:
    return True


def _format(frame: FrameType | None) -> str:
    lines = []
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith((OWN_FOLDER, threading.__file__)):
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}')
        frame = frame.f_back
    return "\n".join(lines)
