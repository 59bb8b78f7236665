"""How a command ends: its exit status, and what ended it early."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

FINE, DIFFERS, WRONG_INPUT, COULD_NOT_RUN = range(4)
MEANING = (
    "everything ran and is right",
    "something differs",
    "wrong arguments or config",
    "it could not run to its end, or could not write",
)
MAY_BE_LEFT = "waits for peers"  # the name of a thread
EXIT_STATUS = (
    "Exit status: 0 if {fine}, 1 if not, 2 for wrong arguments or config, 3 if it could not run to its end or could "
    "not write a file, 130 after Ctrl-C and 143 after SIGTERM."
)


class CouldNotRun(Exception):
    """The input was right, and yet the work did not come to its end."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came.

    Attributes:
        signal: which.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"interrupted by {self.signal.name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """What ended a run before its end; an empty reason and status 0 where nothing did."""

    reason: str = ""
    status: int = FINE

    @classmethod
    def of(cls, error: CouldNotRun | KeyboardInterrupt) -> "Stop":
        if isinstance(error, CouldNotRun):
            return cls(reason=str(error), status=COULD_NOT_RUN)
        number = error.signal if isinstance(error, Interrupted) else signal.SIGINT
        return cls(reason=f"interrupted by {number.name}", status=128 + number)


def meaning_of(status: int) -> str:
    """What an exit status says, in words."""
    return MEANING[status] if status < len(MEANING) else f"interrupted by {signal.Signals(status - 128).name}"


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise :class:`Interrupted` in the block, so that it can tell what it has. Main thread."""

    def interrupt(number: int, _frame: object) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(status: int) -> int:
    """``status``; where a thread was left behind, the process ends here with it.

    A collective cannot be broken off. At the ordinary end of Python, a thread in one takes the process down with it.
    """
    if any(thread.name == MAY_BE_LEFT for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    return status


def tell(message: str, status: int) -> int:
    """Print the message of a command that ends early; the status."""
    print(f"moe-dispatch: {message}", file=sys.stderr)
    return status
