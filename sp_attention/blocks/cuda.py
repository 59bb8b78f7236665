"""A tile in torch's attention for CUDA, which says the log of the sum: flash, and the efficient one with a bias.

Written against torch 2.13's signatures and checked on meta tensors. Nobody has run it on a device yet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .tile import Tile

FLASH_WIDTH, AMPERE = 256, (8, 0)
MULTIPLE = 8  # of the width of a head, in both
ROWS_OF_LSE = 32  # the efficient one pads the log of the sum to a multiple
BYTES_OF_BIAS = 16  # and wants each row of a bias to start at one


def flash_takes(q_BLnH: Tensor) -> bool:
    """Whether flash has this dtype, width and device."""
    is_half = q_BLnH.dtype in (torch.float16, torch.bfloat16)
    return is_half and q_BLnH.shape[3] <= FLASH_WIDTH and torch.cuda.get_device_capability(q_BLnH.device) >= AMPERE


def flash_widths(q_BLnH: Tensor, v_BLgH: Tensor) -> tuple[int, int]:
    """Of queries and keys, and of values: it takes one."""
    width = padded(max(q_BLnH.shape[3], v_BLgH.shape[3]), MULTIPLE)
    return width, width


def efficient_widths(q_BLnH: Tensor, v_BLgH: Tensor) -> tuple[int, int]:
    """Of queries and keys, and of values."""
    return padded(q_BLnH.shape[3], MULTIPLE), padded(v_BLgH.shape[3], MULTIPLE)


def padded(size: int, multiple: int) -> int:
    return size + -size % multiple


def flash_forward(tile: Tile) -> tuple[Tensor, Tensor]:
    """The attention of a tile and the log of the sum: (B, n, Lq, H) and (B, n, Lq)."""
    q_BLnH, k_BLgH, v_BLgH = (x.transpose(1, 2) for x in (tile.q_BnLH, tile.k_BgLH, tile.v_BgLH))
    left, right = _window(tile)
    out_BLnH, lse_BnL, *_ = torch.ops.aten._flash_attention_forward(
        q_BLnH, k_BLgH, v_BLgH, None, None, q_BLnH.shape[1], k_BLgH.shape[1], 0.0, False, False,
        scale=tile.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out_BLnH.transpose(1, 2), lse_BnL


def flash_backward(tile: Tile, grad_BnLH: Tensor, out_BnLH: Tensor, lse_BnL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, given the output and the log of the sum over *all* keys."""
    tensors = (grad_BnLH, tile.q_BnLH, tile.k_BgLH, tile.v_BgLH, out_BnLH)
    grad_BLnH, q_BLnH, k_BLgH, v_BLgH, out_BLnH = (x.transpose(1, 2) for x in tensors)
    left, right = _window(tile)
    grads = torch.ops.aten._flash_attention_backward(
        grad_BLnH, q_BLnH, k_BLgH, v_BLgH, out_BLnH, lse_BnL.contiguous(), None, None, q_BLnH.shape[1],
        k_BLgH.shape[1], 0.0, False, *_no_random_state(tile),
        scale=tile.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def efficient_forward(tile: Tile) -> tuple[Tensor, Tensor]:
    """The attention of a tile and the log of the sum: (B, n, Lq, H) and (B, n, Lq)."""
    k_BnLH, v_BnLH = _of_one_head_each(tile)
    out_BnLH, lse_BnL, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        tile.q_BnLH, k_BnLH, v_BnLH, _bias(tile), True, scale=tile.scale
    )
    return out_BnLH, lse_BnL[..., : tile.piece.queries]


def efficient_backward(
    tile: Tile, grad_BnLH: Tensor, out_BnLH: Tensor, lse_BnL: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, given the output and the log of the sum over *all* keys."""
    k_BnLH, v_BnLH = _of_one_head_each(tile)
    lse_BnL = F.pad(lse_BnL, (0, -lse_BnL.shape[2] % ROWS_OF_LSE), value=torch.inf)
    dq_BnLH, *grads, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad_BnLH, tile.q_BnLH, k_BnLH, v_BnLH, _bias(tile), out_BnLH, lse_BnL, *_no_random_state(tile), 0.0,
        [True, True, True, False], scale=tile.scale,
    )  # fmt: skip
    dk_BgLH, dv_BgLH = (x.unflatten(1, (tile.k_BgLH.shape[1], -1)).sum(2) for x in grads)
    return dq_BnLH, dk_BgLH, dv_BgLH


def _window(tile: Tile) -> tuple[int | None, int | None]:
    """(left, right) as flash counts them: from the last query, which it has at the place of the last key. A piece is
    cut so that both are at least 0. None for an edge that closes nothing."""
    piece = tile.piece
    ahead = piece.keys - piece.queries
    left = None if piece.low + piece.queries - 1 <= 0 else ahead - piece.low
    return left, None if piece.high >= piece.keys - 1 else piece.high - ahead


def _of_one_head_each(tile: Tile) -> tuple[Tensor, Tensor]:
    """k and v with a head for each query head."""
    per_group = tile.q_BnLH.shape[1] // tile.k_BgLH.shape[1]
    return tile.k_BgLH.repeat_interleave(per_group, dim=1), tile.v_BgLH.repeat_interleave(per_group, dim=1)


def _bias(tile: Tile) -> Tensor | None:
    """What is added, with rows that start where the efficient one wants them."""
    if tile.added is None:
        return None
    shape = (*tile.q_BnLH.shape[:2], tile.piece.queries, tile.piece.keys)
    added_BnLL = tile.added.expand(-1, -1, *shape[2:])
    to = -tile.piece.keys % (BYTES_OF_BIAS // added_BnLL.itemsize)
    return F.pad(added_BnLL, (0, to))[..., : tile.piece.keys].expand(shape)


def _no_random_state(tile: Tile) -> tuple[Tensor, Tensor]:
    """Seed and offset of a dropout that there is not."""
    return tile.q_BnLH.new_zeros((), dtype=torch.int64), tile.q_BnLH.new_zeros((), dtype=torch.int64)
