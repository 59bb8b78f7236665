"""A tile in torch's flash attention for the CPU, which says the log of the sum.

What it does not say, or gets wrong, is seen to by its callers: no queries, keys or heads end the process; a query
whose keys are all masked has a log of 0, not -inf, and so has one that the causal flag and a mask close together.
"""

import torch
from torch import Tensor

from .tile import Tile

ALIGNMENT_BYTES = 64  # of a row of queries or keys; see heads_first


def widths(q_BLnH: Tensor, v_BLgH: Tensor) -> tuple[int, int]:
    """Of queries and keys, and of values: it takes one."""
    width = aligned(max(q_BLnH.shape[3], v_BLgH.shape[3]), q_BLnH)
    return width, width


def aligned(width: int, like: Tensor) -> int:
    """The next width that fills whole 64 bytes."""
    return width + -width % (ALIGNMENT_BYTES // like.itemsize)


def forward(tile: Tile) -> tuple[Tensor, Tensor]:
    """The attention of a tile and the log of the sum: (B, n, Lq, H) and (B, n, Lq)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        tile.q_BnLH,
        tile.k_BgLH,
        tile.v_BgLH,
        0.0,
        tile.added is None and not tile.piece.all_see_all,
        attn_mask=_whole_mask(tile),
        scale=tile.scale,
    )


def backward(tile: Tile, grad_BnLH: Tensor, out_BnLH: Tensor, lse_BnL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, given the output and the log of the sum over *all* keys."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_BnLH,
        tile.q_BnLH,
        tile.k_BgLH,
        tile.v_BgLH,
        out_BnLH,
        lse_BnL,
        0.0,
        tile.added is None and not tile.piece.all_see_all,
        attn_mask=_whole_mask(tile),
        scale=tile.scale,
    )


def _whole_mask(tile: Tile) -> Tensor | None:
    """With all its queries and keys: it may be the same for every row and head only."""
    if tile.added is None:
        return None
    return tile.added.expand(-1, -1, tile.piece.queries, tile.piece.keys).contiguous()
