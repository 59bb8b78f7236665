"""Who decides about the experts of a layer, and what a checkpoint that runs a forward again will need to know."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ....layer.recompute import ForwardMemory, ReentrantMemory, in_backward
from ....routing.sites import Tap
from .calls import Replayed


class Decisions:
    """Of one layer.

    Args:
        when_forgotten: called when no graph needs a replayed forward any more.

    Attributes:
        tap: where records and replays are.
        alive: replayed forwards that may be run again, or still run.
    """

    def __init__(self, when_forgotten: Callable[[], object]) -> None:
        self.tap, self.alive, self._when_forgotten = Tap(), 0, when_forgotten
        self._made, self._chosen = ForwardMemory[Replayed](), ReentrantMemory[Replayed]()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no forwards."""
        return {**vars(self), "alive": 0}

    def are_replayed(self) -> bool:
        """Whether the experts of the call that runs are those of a record."""
        again = self.alive > 0 and (self._made.is_recalling() or self._chosen.is_recalling())
        return again or (bool(self.tap.sources) and not in_backward())

    def recall(self, make: Callable[[], Tensor]) -> Replayed:
        """The experts of a forward, ``make()``; in a recomputation, those of its forward."""
        return self._made.recall(lambda: self._chosen.recall(lambda: self._counted(make())))

    def _counted(self, expert_TK: Tensor) -> Replayed:
        replayed = Replayed(expert_TK)
        self.alive += 1
        weakref.finalize(replayed, self._forget).atexit = False
        return replayed

    def _forget(self) -> None:
        self.alive -= 1
        if not self.alive:
            self._when_forgotten()
