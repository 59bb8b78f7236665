"""torch's attention for CUDA that says the log of the sum, with its arguments, computed by parts on the CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROWS_OF_LSE = 32  # the efficient one pads to a multiple


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, compute_lse: bool, *, scale: float
) -> tuple[Tensor, ...]:
    products = _products(q, k, scale, bias)
    lse = products.logsumexp(-1)
    padding = lse.new_full((*lse.shape[:2], -lse.shape[2] % ROWS_OF_LSE), torch.nan)
    none = torch.zeros((), dtype=torch.int64)
    return (products.softmax(-1) @ v.float()).to(q.dtype), torch.cat([lse, padding], 2), none, none


def _efficient_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout_p: float,
    wanted: list[bool],
    *,
    scale: float,
) -> tuple[Tensor | None, ...]:
    weights = (_products(q, k, scale, bias) - lse[:, :, : q.shape[2], None]).exp()
    return *_gradients(grad, q, k, v, out, weights, scale), None


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *_: Any,
    scale: float,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    products = _products(q, k, scale, _closed(q, k, window_size_left, window_size_right))
    out = (products.softmax(-1) @ v.float()).to(q.dtype).transpose(1, 2)
    none = torch.zeros((), dtype=torch.int64)
    return out, products.logsumexp(-1), none, none, none


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *_: Any,
    scale: float,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    groups = k.shape[1]
    k, v = (x.repeat_interleave(q.shape[1] // groups, 1) for x in (k, v))
    products = _products(q, k, scale, _closed(q, k, window_size_left, window_size_right))
    dq, dk, dv = _gradients(grad, q, k, v, out, (products - lse.unsqueeze(-1)).exp(), scale)
    dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _products(q: Tensor, k: Tensor, scale: float, added: Tensor | None) -> Tensor:
    products = q.float() @ k.float().mT * scale
    return products if added is None else products + added.float()


def _closed(q: Tensor, k: Tensor, left: int | None, right: int | None) -> Tensor:
    """-inf beyond a window, with the last query at the place of the last key."""
    ahead = k.shape[2] - q.shape[2]
    distance = torch.arange(k.shape[2]) - (torch.arange(q.shape[2]) + ahead)[:, None]
    closed = torch.zeros(distance.shape)
    closed[(distance < -(k.shape[2] + q.shape[2] if left is None else left))] = -torch.inf
    closed[(distance > (k.shape[2] + q.shape[2] if right is None else right))] = -torch.inf
    return closed


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_f = grad.float()
    delta = (grad_f * out.float()).sum(-1, keepdim=True)
    d_products = weights * (grad_f @ v.float().mT - delta) * scale
    dq, dk, dv = d_products @ k.float(), d_products.mT @ q.float(), weights.mT @ grad_f
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def kernels() -> dict[str, Callable[..., Any]]:
    """By torch's names."""
    return {
        "aten::_scaled_dot_product_efficient_attention": _efficient,
        "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
        "aten::_flash_attention_forward": _flash,
        "aten::_flash_attention_backward": _flash_backward,
    }
