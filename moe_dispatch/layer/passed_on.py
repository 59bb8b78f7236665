"""Backward passes through the experts of every rank, whatever they computed with."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def passed_on(y_MD: Tensor, weight_M: Tensor) -> Tensor:
    """``y_MD``, whose backward goes on to the exchange that brought ``weight_M``, and is part of the graph.

    Experts that got no rows may return zeros that nothing led to, and others may use their parameters alone. That
    rank would leave exchanges of backward to its peers. Called where somebody wants a gradient.
    """
    if not weight_M.requires_grad:  # that of combine is the only exchange of backward
        weight_M = weight_M.new_empty(0).requires_grad_()
    return _PassedOn.apply(y_MD, weight_M)  # type: ignore[return-value]


class _PassedOn(torch.autograd.Function):
    """forward   y_MD
    backward  d y_MD, and zeros for weight_M

    Where backward does not reach dispatch, which asks every rank for a checkpoint's recomputation, this does.
    """

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, weight_M: Tensor) -> Tensor:
        ctx.size, ctx.dtype = weight_M.shape, weight_M.dtype
        ctx.save_for_backward(*[weight_M] * weight_M.is_leaf)
        return y_MD.view_as(y_MD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _ = ctx.saved_tensors
        return grads[0], grads[0].new_zeros(ctx.size, dtype=ctx.dtype)
