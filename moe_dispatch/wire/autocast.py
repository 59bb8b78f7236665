"""torch.autocast over ranks: every rank casts alike, also one that has nothing to multiply."""

from contextlib import AbstractContextManager, nullcontext

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
