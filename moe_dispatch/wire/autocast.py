"""torch.autocast over ranks: every rank casts alike, also one that has nothing to multiply."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor


def cast_to_autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast gives the inputs of a product, if it is on; float64 stays.

    Done by hand: a rank without heads or experts never calls what would cast, and its peers wait for bytes of one
    dtype.
    """
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    eligible = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(kind)) if eligible else x


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """For products that are meant in the dtype they are written in."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def autocast_as_now(x: Tensor) -> Callable[[], AbstractContextManager[object]]:
    """Makes contexts in which autocast is as it is now: backward runs outside of the caller's, and in other threads.

    No cast is cached: one that was made without gradients would serve a product that wants them.
    """
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return partial(torch.autocast, kind, dtype=dtype, enabled=enabled, cache_enabled=False)
