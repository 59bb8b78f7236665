"""What a device was seen to do, and the line of the library that asked for it."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import moe_dispatch
import sp_attention

PACKAGES = tuple(str(Path(str(package.__file__)).parent) for package in (moe_dispatch, sp_attention))
OF_RANKS = str(Path(PACKAGES[0], "testing"))
AUTOGRAD = "autograd"  # in place of a line, where torch's own backward asks


@dataclass(slots=True)
class Report:
    """What one stretch of a program did.

    Attributes:
        kernels: operations that write memory: a lower bound of CUDA's kernels.
        d2h: copies to the host, which it waits for, by line.
        h2d: copies of what the host made, which it waits for, by line.
        background: copies from and to pinned memory, which nobody waits for yet, by line.
        collectives: their names, in order.
        unordered: writes whose order CUDA leaves open, so that results would differ from run to run.
    """

    kernels: int = 0
    d2h: Counter[str] = field(default_factory=Counter)
    h2d: Counter[str] = field(default_factory=Counter)
    background: Counter[str] = field(default_factory=Counter)
    collectives: list[str] = field(default_factory=list)
    unordered: Counter[str] = field(default_factory=Counter)

    @property
    def row(self) -> tuple[int, int, int, int]:
        """Kernels, copies to the host and from it, collectives."""
        return self.kernels, self.d2h.total(), self.h2d.total(), len(self.collectives)


def line() -> str:
    """The innermost line of the library among the callers, as ``rows/dispatch.py:12``."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGES) and not path.startswith(OF_RANKS):
            package = next(package for package in PACKAGES if path.startswith(package))
            return f"{path[len(package) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return AUTOGRAD
