"""A tile in matrix products: for any widths and device, with dropout and gradients of masks.

In float32, or float64 for float64. One key/value head at a time: a CPU product of several has other last bits than
that of one, and the memory is that of a few heads.
"""

import torch
from torch import Tensor

from ..dtypes import dtype_of_sums
from .tile import Tile


def forward(tile: Tile) -> tuple[Tensor, Tensor]:
    """The attention of a tile and the log of the sum: (B, n, Lq, H) and (B, n, Lq)."""
    outs, sums = [], []
    for group in range(tile.k_BgLH.shape[1]):
        products_BrLL, keep_BrLL = _products(tile, group)
        top_BrL1 = products_BrLL.amax(-1, keepdim=True).clamp_min_(torch.finfo(products_BrLL.dtype).min)
        power_BrLL = products_BrLL.sub_(top_BrL1).exp_()
        total_BrL1 = power_BrLL.sum(-1, keepdim=True)
        sums.append((total_BrL1.log() + top_BrL1).squeeze(-1))
        if keep_BrLL is not None:
            power_BrLL.mul_(keep_BrLL)
        v_BLH = tile.v_BgLH[:, group].to(power_BrLL.dtype)
        out_BrLH = (power_BrLL.flatten(1, 2) @ v_BLH).unflatten(1, power_BrLL.shape[1:3])
        outs.append(out_BrLH / total_BrL1.masked_fill(total_BrL1 == 0, 1.0))
    return torch.cat(outs, dim=1), torch.cat(sums, dim=1)


def backward(
    tile: Tile,
    grad_BnLH: Tensor,
    lse_BnL: Tensor,
    delta_BnL: Tensor,
    mask_grad_BnLL: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, given the log of the sum over *all* keys.

    Args:
        grad_BnLH: of the output.
        lse_BnL: of all keys and the sink; not -inf.
        delta_BnL: the output times its gradient, summed over the width.
        mask_grad_BnLL: (B, n, Lq, Lk), each or 1: to add the gradient of the mask to. None: nobody wants it.
    """
    grads = []
    per_group = tile.q_BnLH.shape[1] // tile.k_BgLH.shape[1]
    for group in range(tile.k_BgLH.shape[1]):
        heads = slice(group * per_group, (group + 1) * per_group)
        products_BrLL, keep_BrLL = _products(tile, group)
        weight_BrLL = products_BrLL.sub_(lse_BnL[:, heads].unsqueeze(-1)).exp_()
        dtype, shape = weight_BrLL.dtype, weight_BrLL.shape[1:3]
        q_BrH, grad_BrH = (x[:, heads].flatten(1, 2).to(dtype) for x in (tile.q_BnLH, grad_BnLH))
        k_BLH, v_BLH = (x[:, group].to(dtype) for x in (tile.k_BgLH, tile.v_BgLH))
        d_weight_BrLL = (grad_BrH @ v_BLH.mT).unflatten(1, shape)
        kept_BrLL = weight_BrLL
        if keep_BrLL is not None:
            kept_BrLL = weight_BrLL * keep_BrLL
            d_weight_BrLL.mul_(keep_BrLL)
        dv_BLH = kept_BrLL.flatten(1, 2).mT @ grad_BrH
        d_product_BrLL = d_weight_BrLL.sub_(delta_BnL[:, heads].unsqueeze(-1)).mul_(weight_BrLL)
        if mask_grad_BnLL is not None:
            mine = mask_grad_BnLL[:, heads] if mask_grad_BnLL.shape[1] > 1 else mask_grad_BnLL
            mine.add_(d_product_BrLL.sum_to_size(mine.shape))
        d_product_BRL = d_product_BrLL.flatten(1, 2).mul_(tile.scale)
        grads.append(((d_product_BRL @ k_BLH).unflatten(1, shape), d_product_BRL.mT @ q_BrH, dv_BLH))
    dq, dk, dv = zip(*grads, strict=True)
    return torch.cat(dq, dim=1), torch.stack(dk, dim=1), torch.stack(dv, dim=1)


def _products(tile: Tile, group: int) -> tuple[Tensor, Tensor | None]:
    """(B, r, Lq, Lk) of the r query heads of a key/value head, scaled and masked; and what dropout multiplies each
    weight by."""
    per_group = tile.q_BnLH.shape[1] // tile.k_BgLH.shape[1]
    heads = slice(group * per_group, (group + 1) * per_group)
    dtype = dtype_of_sums(tile.q_BnLH)
    q_BrLH, k_BLH = tile.q_BnLH[:, heads].to(dtype), tile.k_BgLH[:, group].to(dtype)
    products_BrLL = (q_BrLH.flatten(1, 2) @ k_BLH.mT).unflatten(1, q_BrLH.shape[1:3]).mul_(tile.scale)
    if tile.added is not None:
        products_BrLL.add_(tile.added[:, heads] if tile.added.shape[1] > 1 else tile.added)
    if tile.dropout is None:
        return products_BrLL, None
    # A head at a time: the pattern is hashed in int64, in several tensors at once.
    ours = range(heads.start, heads.stop)
    keeps_B1LL = [tile.dropout.of_heads(head).keep(products_BrLL[:, :1]) for head in ours]
    return products_BrLL, torch.cat(keeps_B1LL, dim=1).to(dtype).div_(1 - tile.dropout.p)
