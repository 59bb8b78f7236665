"""Which kernel computes a tile."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cpu_flash, cuda, plain
from .pieces import Piece
from .tile import Options, Tile

Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """How tiles are computed.

    Attributes:
        widths: of (queries, values) -> the widths that tiles need, of queries and keys and of values.
        takes_piece: whether it closes the pairs beyond the edges of such a piece by itself, where no tensor does.
        forward: of a tile -> its attention and the log of the sum.
        backward: of (tile, gradient, output, log of the whole sum, delta, gradient of the mask) -> of q, k and v.
    """

    widths: Callable[[Tensor, Tensor], tuple[int, int]]
    takes_piece: Callable[[Piece], bool]
    forward: Callable[[Tile], tuple[Tensor, Tensor]]
    backward: Callable[[Tile, Tensor, Tensor, Tensor, Tensor, Tensor | None], Grads]


def kernel_for(q_BLnH: Tensor, options: Options, mask_learns: bool) -> Kernel:
    """The fastest that can. Fused ones have neither a gradient of a mask nor our dropout.

    Args:
        mask_learns: whether backward has to give a gradient of the mask.
    """
    if options.dropout is not None or mask_learns:
        return _plain()
    if q_BLnH.device.type == "cpu":
        return _cpu_flash()
    if q_BLnH.device.type != "cuda" or q_BLnH.dtype == torch.float64:
        return _plain()
    return _cuda_flash() if cuda.flash_takes(q_BLnH) and not options.has_masks else _cuda_efficient()


def _plain() -> Kernel:
    return Kernel(
        widths=lambda q, v: (cpu_flash.aligned(q.shape[3], q), cpu_flash.aligned(v.shape[3], v)),
        takes_piece=lambda piece: piece.all_see_all,
        forward=plain.forward,
        backward=lambda tile, grad, out, lse, delta, mask: plain.backward(tile, grad, lse, delta, mask),
    )


def _cpu_flash() -> Kernel:
    return Kernel(
        widths=cpu_flash.widths,
        takes_piece=lambda piece: piece.all_see_all or piece.is_causal,
        forward=cpu_flash.forward,
        backward=lambda tile, grad, out, lse, delta, mask: cpu_flash.backward(tile, grad, out, lse),
    )


def _cuda_flash() -> Kernel:
    return Kernel(
        widths=cuda.flash_widths,
        takes_piece=lambda piece: True,
        forward=cuda.flash_forward,
        backward=lambda tile, grad, out, lse, delta, mask: cuda.flash_backward(tile, grad, out, lse),
    )


def _cuda_efficient() -> Kernel:
    return Kernel(
        widths=cuda.efficient_widths,
        takes_piece=lambda piece: piece.all_see_all,
        forward=cuda.efficient_forward,
        backward=lambda tile, grad, out, lse, delta, mask: cuda.efficient_backward(tile, grad, out, lse),
    )
