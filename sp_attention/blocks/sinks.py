"""Sinks: one key more for each head, which takes weight and has no value."""

import torch
from torch import Tensor

from .merge import weight
from .walk import Attended


def with_sinks(lse_BnL: Tensor, sinks_n: Tensor | None) -> Tensor:
    """(B, n, L) the log of the sum with the sink of each head, which is one key more."""
    return lse_BnL if sinks_n is None else torch.logaddexp(lse_BnL, sinks_n.to(lse_BnL.dtype)[:, None])


def add_sinks(out_BLnH: Tensor, lse_BnL: Tensor, sinks_n: Tensor | None) -> None:
    """Take the share of the sinks from the attention of all keys, in place; ``lse_BnL`` stays without them."""
    if sinks_n is not None:
        share_BnL = weight(lse_BnL, with_sinks(lse_BnL, sinks_n))
        out_BLnH.mul_(share_BnL.transpose(1, 2).unsqueeze(-1))


def gradient_of_sinks(attended: Attended, sinks_n: Tensor) -> Tensor:
    """(n,): what a sink takes from the output of each query that has a key."""
    share_BnL = weight(sinks_n.to(attended.lse_BnL.dtype)[:, None].expand_as(attended.lse_BnL), attended.lse_BnL)
    delta_BnL = (attended.grad_BLnH.to(share_BnL.dtype) * attended.out_BLnH).sum(-1).transpose(1, 2)
    return -(share_BnL * delta_BnL).masked_fill(attended.closed_BnL, 0.0).sum((0, 2)).to(sinks_n.dtype)
