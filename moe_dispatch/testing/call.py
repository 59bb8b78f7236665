"""What a call on several ranks takes, whether they are processes or threads."""

import inspect
import math
import os
import sys
from collections.abc import Callable
from typing import Any


def check_call(ranks: int, timeout: float) -> None:
    """ValueError unless these are a number of ranks and a number of seconds."""
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
        raise ValueError(f"ranks is {ranks!r}; it has to be an int of at least 1: run(fn, ranks, *args)")
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < math.inf:
        raise ValueError(f"timeout is {timeout!r}; it has to be a number of seconds above 0: timeout=60")


def check_main(fn: Callable[..., Any]) -> None:
    """ValueError where a new process cannot import what the caller's program is, e.g. standard input."""
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:  # python -m
        return
    path = getattr(main, "__file__", None)
    is_from_main = getattr(fn, "__module__", "") == "__main__"
    if (path is None and is_from_main) or (path is not None and not os.path.exists(path)):
        raise ValueError(
            f"{name_of(fn)} cannot be called on ranks that are processes: a rank imports the caller's program, which "
            "is in no file here (standard input, python -c, a notebook); put the function into a module, or use "
            "RankThreads"
        )


def name_of(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", repr(fn))


def takes_rank(fn: Callable[..., Any]) -> bool:
    """Whether its first parameter is named ``rank``."""
    try:
        return next(iter(inspect.signature(fn).parameters), None) == "rank"
    except ValueError:  # some builtins have no signature, e.g. time.sleep
        return False
