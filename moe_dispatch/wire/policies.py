"""What selective checkpointing does not get to see: the plan, and how rows travel.

``create_selective_checkpoint_contexts`` numbers the operations of a forward and hands out what it saved by these
numbers, so a recomputation has to run the same operations. Ours does not: it takes the plan of its forward. Nor can
what a collective filled be saved by saving what the collective returned. So neither of the two modes sees what
happens in here: no policy is asked, nothing is counted, and the recomputation does it again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.utils import _python_dispatch as modes
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

P = ParamSpec("P")
R = TypeVar("R")


def unseen_by_policies(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, hidden from selective checkpointing. Not in compiled code, where operations are told apart by
    their place in the graph."""

    @wraps(function)
    def hidden(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not modes._get_current_dispatch_mode_stack():
            return function(*args, **kwargs)
        with _without_policies():
            return function(*args, **kwargs)

    return hidden


@contextmanager
def _without_policies() -> Iterator[None]:
    """Without the modes of a selective checkpoint; others (counters, debuggers) stay, in their order."""
    stack = modes._get_current_dispatch_mode_stack()
    kept = [mode for mode in stack if not isinstance(mode, _CachingTorchDispatchMode | _CachedTorchDispatchMode)]
    _replace(stack, kept)
    try:
        yield
    finally:
        _replace(kept, stack)


def _replace(stack: list[modes.TorchDispatchMode], by: list[modes.TorchDispatchMode]) -> None:
    for _ in stack:
        modes._pop_mode()
    for mode in by:
        modes._push_mode(mode)
