"""torch's attention, as one kernel of the device: computed on the CPU by torch's own, forward and backward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .device import CudaTensor

on_the_host: Any = F.scaled_dot_product_attention


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """torch makes ``where(mask, 0.0, -inf)`` of a bool mask: a number of the host in every call."""
    if not isinstance(query, CudaTensor):
        return on_the_host(query, key, value, attn_mask, **options)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        query.gpu.copy_from_host()
    return _Attention.apply(options, query, key, value, attn_mask)  # type: ignore[return-value]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Any, *tensors: Any) -> Tensor:
        assert all(x is None or isinstance(x, CudaTensor) for x in tensors), "q, k, v and a mask on two devices"
        ctx.gpu = tensors[0].gpu
        ctx.gpu.kernel()
        with _disable_current_modes(), torch.enable_grad():
            ctx.hosts = [
                None if x is None else x.host.detach().requires_grad_(x.is_floating_point()) for x in tensors
            ]
            ctx.out = on_the_host(*ctx.hosts, **options)
        return CudaTensor(ctx.out.detach().clone(), ctx.gpu)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        ctx.gpu.kernel()
        wanted = [host for host, needed in zip(ctx.hosts, ctx.needs_input_grad[1:], strict=True) if needed]
        with _disable_current_modes():
            found = iter(torch.autograd.grad(ctx.out, wanted, grads[0].host))
        return None, *(CudaTensor(next(found), ctx.gpu) if needed else None for needed in ctx.needs_input_grad[1:])
