"""Attention over pieces, tile by tile: forward with the log of the sum, backward from the output and that log.

Source: FlashAttention-2 (arXiv:2307.08691). Sums are taken in float32, or float64 for float64, and in the order of
the pieces, so that their bits do not depend on what came first.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import Kernel, kernel_for
from .merge import merge
from .pieces import Piece, row_blocks, tiles
from .tile import Options, Tile, heads_first, mask_of, nobody_sees, part_of_mask


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attended:
    """What backward knows of all keys, also of those that are not at hand.

    Attributes:
        grad_BLnH: of the output.
        out_BLnH: the output.
        lse_BnL: the log of the sum over all keys, and the sink where there is one.
        closed_BnL: bool, True for a query that no key attends to.
    """

    grad_BLnH: Tensor
    out_BLnH: Tensor
    lse_BnL: Tensor
    closed_BnL: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gradients:
    """To add to, float32 or float64.

    Attributes:
        q_BLnH, k_BLgH, v_BLgH: of the rows at hand.
        mask_BnLL: (B, n, L, L_kv), each or 1, by place. None: nobody wants it.
    """

    q_BLnH: Tensor
    k_BLgH: Tensor
    v_BLgH: Tensor
    mask_BnLL: Tensor | None


def add_attention(
    out_BLnH: Tensor,
    lse_BnL: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    pieces: Iterable[Piece],
    options: Options,
) -> None:
    """Add the attention of some keys to that of those before, in place.

    Args:
        out_BLnH, lse_BnL: (B, Lq, n, Hv) and (B, n, Lq), float32 or float64; 0 and -inf where there was no key yet.
        qkv: (B, Lq, n, H), (B, Lk, g, H) and (B, Lk, g, Hv) of any strides.
        pieces: of these rows. Empty tensors have no pieces.
        options: what was asked for.
    """
    q_BLnH, k_BLgH, v_BLgH = qkv
    kernel = kernel_for(q_BLnH, options, mask_learns=False)
    widths = kernel.widths(q_BLnH, v_BLgH)
    out_BnLH, width = out_BLnH.transpose(1, 2), v_BLgH.shape[3]
    for piece in pieces:
        for block in row_blocks(piece, options.chunk):
            q_BnLH = heads_first(q_BLnH, block.q_row, block.queries, widths[0])
            for at in tiles(block, options.chunk):
                tile, closed_BnL = _tile(kernel, at, _rows(q_BnLH, at, block), (k_BLgH, v_BLgH), widths, options)
                if nobody_sees(closed_BnL):
                    continue
                part_BnLH, part_lse_BnL = kernel.forward(tile)
                if closed_BnL is not None:  # torch's says 0, and a merge that believes it is wrong
                    part_lse_BnL = part_lse_BnL.masked_fill(closed_BnL, -torch.inf)
                    part_BnLH = part_BnLH.masked_fill(closed_BnL.unsqueeze(-1), 0.0)
                rows = slice(at.q_row, at.q_row + at.queries)
                merge(out_BnLH[:, :, rows], lse_BnL[:, :, rows], part_BnLH[..., :width], part_lse_BnL)


def add_gradients(
    grads: Gradients,
    attended: Attended,
    qkv: tuple[Tensor, Tensor, Tensor],
    pieces: Iterable[Piece],
    options: Options,
) -> None:
    """Add the gradients of what :func:`add_attention` computed, in place. Arguments as there."""
    q_BLnH, k_BLgH, v_BLgH = qkv
    kernel = kernel_for(q_BLnH, options, mask_learns=grads.mask_BnLL is not None)
    widths = kernel.widths(q_BLnH, v_BLgH)
    to_q, to_k, to_v = (x.transpose(1, 2) for x in (grads.q_BLnH, grads.k_BLgH, grads.v_BLgH))
    for piece in pieces:
        for block in row_blocks(piece, options.chunk):
            q_BnLH = heads_first(q_BLnH, block.q_row, block.queries, widths[0])
            known = _of_rows(attended, block, widths[1])
            for at in tiles(block, options.chunk):
                tile, closed_BnL = _tile(kernel, at, _rows(q_BnLH, at, block), (k_BLgH, v_BLgH), widths, options)
                if nobody_sees(closed_BnL):
                    continue
                mask = None if grads.mask_BnLL is None else part_of_mask(grads.mask_BnLL, at)
                grad_BnLH, out_BnLH, lse_BnL, delta_BnL = (_rows(x, at, block) for x in known)
                dq, dk, dv = kernel.backward(tile, grad_BnLH, out_BnLH, lse_BnL, delta_BnL, mask)
                to_q[:, :, at.q_row : at.q_row + at.queries] += dq[..., : to_q.shape[3]]
                to_k[:, :, at.k_row : at.k_row + at.keys] += dk[..., : to_k.shape[3]]
                to_v[:, :, at.k_row : at.k_row + at.keys] += dv[..., : to_v.shape[3]]


def _of_rows(attended: Attended, block: Piece, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a block of rows, heads first: the gradient and the output, the log of the sum, and their product summed over
    the width."""
    rows = slice(block.q_row, block.q_row + block.queries)
    closed_BnL = attended.closed_BnL[:, :, rows]
    grad_BnLH, out_BnLH = (
        heads_first(x, block.q_row, block.queries, width) for x in (attended.grad_BLnH, attended.out_BLnH)
    )
    grad_BnLH = grad_BnLH.masked_fill(closed_BnL.unsqueeze(-1), 0.0)  # it may be NaN
    lse_BnL = attended.lse_BnL[:, :, rows].masked_fill(closed_BnL, 0.0)
    delta_BnL = (grad_BnLH.to(lse_BnL.dtype) * out_BnLH).sum(-1)
    return grad_BnLH, out_BnLH, lse_BnL, delta_BnL


def _rows(x_BnL: Tensor, at: Piece, block: Piece) -> Tensor:
    """The rows of a tile, of those of its block."""
    return x_BnL.narrow(2, at.q_row - block.q_row, at.queries)


def _tile(
    kernel: Kernel,
    at: Piece,
    q_BnLH: Tensor,
    kv: tuple[Tensor, Tensor],
    widths: tuple[int, int],
    options: Options,
) -> tuple[Tile, Tensor | None]:
    """The tensors of a tile, and (B, n, Lq) bool which queries have no key in it; None where each has one."""
    added, closed_BnL = mask_of(at, options, q_BnLH, kernel.takes_piece(at))
    if closed_BnL is not None:  # its gradient is 0, which times NaN would be NaN
        q_BnLH = q_BnLH.masked_fill(closed_BnL.unsqueeze(-1), 0.0)
    k_BgLH, v_BgLH = (heads_first(x, at.k_row, at.keys, w) for x, w in zip(kv, widths, strict=True))
    dropout = None if options.dropout is None else options.dropout.at(at.q_place, at.k_place)
    tile = Tile(
        piece=at, q_BnLH=q_BnLH, k_BgLH=k_BgLH, v_BgLH=v_BgLH, added=added, scale=options.scale, dropout=dropout
    )
    return tile, closed_BnL
