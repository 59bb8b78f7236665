"""What an exchange brings besides tensors, and why its backward wants it in compiled code."""

from typing import Any

import torch
from torch import Tensor

NUMBERS = 8  # a header is some times so many: 16 bytes or more, so that what follows it is aligned as it is


def no_header(like: Tensor) -> Tensor:
    """A header that says nothing: empty, but in compiled code."""
    return like.new_zeros(NUMBERS * torch.compiler.is_compiling())


def as_heads(headers: Tensor) -> Tensor:
    """(numbers,) or (ranks, numbers) -> (1, 1 or ranks, 1, numbers): as tensors of tokens and heads travel."""
    return headers.view(1, *(headers.shape[:-1] or (1,)), 1, headers.shape[-1])


def keep_for_recomputation(ctx: Any, headers: Tensor) -> None:
    """Have backward need what this exchange brought, in compiled code.

    A compiled checkpoint recomputes an exchange on the ranks whose backward needs something of it. A rank without
    tokens or heads needs nothing: saving an empty tensor is free, so the compiler saves it and leaves the exchange
    out, while the peers wait for that rank. Headers are never empty.
    """
    if torch.compiler.is_compiling():
        ctx.save_for_backward(headers)


def header_backward(ctx: Any, like: Tensor) -> Tensor:
    """What travels with the gradients: of what was kept, where something was."""
    return ctx.saved_tensors[0][0] if ctx.saved_tensors else like.new_empty(0)
