"""One tile: some queries, some keys, and what is closed between them. Heads first, as kernels want it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .dropout import Dropout
from .pieces import Piece


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Options:
    """What was asked for, for whole sequences.

    Attributes:
        scale: of the products.
        attn_mask: (B, n, L, L_kv), each or 1, by place: bool (True attends), or added to the products. None: no pair
            is closed, and nothing added.
        key_padding_mask: (B, L_kv), by place, True attends. None: every key does.
        dropout: None: nothing is dropped.
        chunk: the most queries, and the most keys, of a tile.
    """

    scale: float
    attn_mask: Tensor | None
    key_padding_mask: Tensor | None
    dropout: Dropout | None
    chunk: int

    @property
    def has_masks(self) -> bool:
        """Whether a tensor closes pairs, or is added."""
        return self.attn_mask is not None or self.key_padding_mask is not None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tile:
    """What a kernel computes at once.

    Attributes:
        piece: which rows these are.
        q_BnLH, k_BgLH, v_BgLH: dense, with zeros up to the widths of the kernel.
        added: broadcasts to (B, n, Lq, Lk), in the dtype of the queries, -inf where a pair is closed. None: the piece
            says all.
        scale: of the products.
        dropout: with the places of this tile; None: nothing is dropped.
    """

    piece: Piece
    q_BnLH: Tensor
    k_BgLH: Tensor
    v_BgLH: Tensor
    added: Tensor | None
    scale: float
    dropout: Dropout | None


def heads_first(x_BLnH: Tensor, row: int, rows: int, width: int) -> Tensor:
    """(B, n, rows, width) dense, zeros behind the last column.

    A CPU kernel's last bit depends on strides and alignment, so on the number of heads beside this one, and torch's
    is wrong in silence for a last dimension that is not dense.
    """
    x_BnLH = x_BLnH[:, row : row + rows].transpose(1, 2)
    if x_BnLH.shape[3] == width:
        return x_BnLH.contiguous()
    wide_BnLH = x_BnLH.new_zeros(*x_BnLH.shape[:3], width)
    wide_BnLH[..., : x_BnLH.shape[3]] = x_BnLH
    return wide_BnLH


def mask_of(
    piece: Piece, options: Options, like: Tensor, kernel_takes_piece: bool
) -> tuple[Tensor | None, Tensor | None]:
    """All masks of a tile in one, and the queries that they leave no key of it.

    Args:
        piece: which rows these are.
        options: with the masks.
        like: of the device and dtype of the queries.
        kernel_takes_piece: whether the kernel closes what is beyond the edges of this piece by itself.

    Returns:
        What is added, as in :class:`Tile`, None where nothing has to be; and (B, n, Lq), each or 1, True for queries
        without a key. None where no tensor closes anything: each query of a piece sees a key of it.
    """
    closing_BnLL, bias_BnLL = _masks_of_tile(piece, options, like)
    has_tensors = bool(closing_BnLL) or bias_BnLL is not None
    if not has_tensors and kernel_takes_piece:
        return None, None
    if not piece.all_see_all:
        closing_BnLL.append(beyond(piece, like))
    added_BnLL = sum(closing_BnLL[1:], closing_BnLL[0]) if closing_BnLL else None
    if bias_BnLL is not None:  # NaN of it attends, and shows, unless the others close the pair
        added_BnLL = bias_BnLL if added_BnLL is None else bias_BnLL.masked_fill(added_BnLL == -torch.inf, -torch.inf)
    if added_BnLL is None or not has_tensors:
        return added_BnLL, None
    return added_BnLL, added_BnLL.amax(-1) == -torch.inf


def _masks_of_tile(piece: Piece, options: Options, like: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The bool masks of a tile, as 0 and -inf, and the one that is a bias.

    On the CPU, where looking costs no waiting, those that close nothing are left out: most of padding is at one end.
    """
    closing_BnLL, bias_BnLL = [], None
    if options.key_padding_mask is not None:
        keep_BL = options.key_padding_mask.narrow(1, piece.k_place, piece.keys)
        closing_BnLL.append(closed_as_inf(keep_BL[:, None, None, :], like))
    if options.attn_mask is not None:
        mask_BnLL = part_of_mask(options.attn_mask, piece)
        if mask_BnLL.dtype == torch.bool:
            closing_BnLL.append(closed_as_inf(mask_BnLL, like))
        else:  # cast first: the lowest float32, a usual way to say "no", is -inf in bfloat16
            bias_BnLL = mask_BnLL.to(like.dtype)
    return [mask for mask in closing_BnLL if like.device.type != "cpu" or mask.amin() < 0], bias_BnLL


def nobody_sees(closed_BnL: Tensor | None) -> bool:
    """Whether no query has a key in a tile. On the CPU only, where looking costs no waiting."""
    return closed_BnL is not None and closed_BnL.device.type == "cpu" and bool(closed_BnL.all())


def closed_as_inf(keep_BnLL: Tensor, like: Tensor) -> Tensor:
    """0 where True, -inf where False: 1 - 1 / 1 and 1 - 1 / 0.

    Of 512 x 512 in 0.06 ms on a CPU core, where masked_fill takes 0.84 and the attention of a head 1.8.
    """
    return 1 - keep_BnLL.to(like.dtype).reciprocal_()


def beyond(piece: Piece, like: Tensor) -> Tensor:
    """(1, 1, Lq, Lk): 0 between the edges of a piece, -inf beyond."""
    closed_LL = like.new_full((piece.queries, piece.keys), -torch.inf)
    right_LL = closed_LL.triu(min(piece.high, piece.keys) + 1)
    return (right_LL + closed_LL.tril_(max(piece.low, -piece.queries) - 1))[None, None]


def part_of_mask(mask_BnLL: Tensor, piece: Piece) -> Tensor:
    """The view of a mask by place, or of its gradient, that a tile needs."""
    if mask_BnLL.shape[2] > 1:
        mask_BnLL = mask_BnLL.narrow(2, piece.q_place, piece.queries)
    return mask_BnLL.narrow(3, piece.k_place, piece.keys) if mask_BnLL.shape[3] > 1 else mask_BnLL
