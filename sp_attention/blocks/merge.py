"""Attention of one set of keys and of another is attention of both, given the log of the sum of each."""

import torch
from torch import Tensor


def merge(out_BnLH: Tensor, lse_BnL: Tensor, part_BnLH: Tensor, part_lse_BnL: Tensor) -> None:
    """Add the attention of further keys to that of those before, in place.

    Args:
        out_BnLH, lse_BnL: so far, float32 or float64; 0 and -inf where there was no key.
        part_BnLH, part_lse_BnL: of the further keys. Rows without a key there have -inf, and are 0.
    """
    both_BnL = torch.logaddexp(lse_BnL, part_lse_BnL)
    scale_BnL, part_scale_BnL = (weight(lse, both_BnL) for lse in (lse_BnL, part_lse_BnL))
    out_BnLH.mul_(scale_BnL.unsqueeze(-1)).addcmul_(part_BnLH.to(out_BnLH.dtype), part_scale_BnL.unsqueeze(-1))
    lse_BnL.copy_(both_BnL)


def weight(lse_BnL: Tensor, whole_BnL: Tensor) -> Tensor:
    """(B, n, L) the share of these keys among all of them; 0 where there are none at all."""
    return (lse_BnL - whole_BnL.masked_fill(whole_BnL == -torch.inf, 0.0)).exp_()
