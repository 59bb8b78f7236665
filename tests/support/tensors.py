"""A rank's share of a whole tensor, its gradient, and how far one tensor is from another."""

from typing import Literal

import torch
from torch import Tensor

TOLERANCE = 1e-12
Order = Literal["BL", "LB"]


def share(whole_BLNH: Tensor, sizes: tuple[int, ...], order: Order, rank: int) -> Tensor:
    """A rank's tokens of a whole tensor, cut by slicing."""
    start = sum(sizes[:rank])
    mine_BlNH = whole_BLNH[:, start : start + sizes[rank]]
    return mine_BlNH if order == "BL" else mine_BlNH.transpose(0, 1)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def grad_of(x: Tensor) -> Tensor:
    assert x.grad is not None, "no gradient: not part of the graph"
    return x.grad


def difference(got: Tensor, wanted: Tensor) -> float:
    """Relative to the largest value wanted, or to 1; infinite if a shape or dtype differs, or there is a NaN."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype or not got.isfinite().all():
        return float("inf")
    scale = max(wanted.abs().amax().item(), 1.0) if wanted.numel() else 1.0
    return (got - wanted).abs().amax().item() / scale if got.numel() else 0.0


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    return got.dtype == wanted.dtype and torch.equal(got, wanted)


def scattered(total: int, ranks: int) -> tuple[int, ...]:
    """Sizes of ``total`` things, fewer than 16 or 64 ranks: one each, on ranks that are 7 apart."""
    owners = {7 * i % ranks for i in range(total)}
    return tuple(int(rank in owners) for rank in range(ranks))
