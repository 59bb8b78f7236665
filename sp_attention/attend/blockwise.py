"""An ``attend`` in bounded memory: tiles of queries and keys, of which only those are computed that somebody sees."""

from collections.abc import Callable
from functools import partial
from numbers import Integral
from operator import index

import torch
from torch import Tensor

from moe_dispatch.internals import cast_to_autocast

from ..blocks import operators  # noqa: F401  (registers the operator)
from ..blocks.dropout import Dropout
from ..blocks.pieces import FAR, Piece, as_ints
from .masks import sides_of, with_lost_queries, without_padding


def blockwise_attend(*, chunk: int = 512) -> Callable[..., Tensor]:
    """Make an ``attend`` for :func:`ulysses_attention` that honours every option and makes no (L, L_kv) tensor.

    Memory is that of q, k, v, the output and their gradients, and of tiles of ``chunk`` queries and keys; a mask is
    used a tile at a time. Tiles that nobody sees are left out: of a causal call half, of a window all but those along
    the diagonal. The result is that of :func:`scaled_dot_product`, with another rounding: within 1e-12 in float64.
    Sums are taken in float32 (float64 for float64). It has no second derivative.

    Args:
        chunk: how many queries, and how many keys, are computed at once, at least 1; it need not divide anything.

    Raises:
        ValueError: a chunk that is no int, or below 1.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, Integral) or chunk < 1:
        raise ValueError(
            f"chunk is {chunk!r}; it is how many queries and how many keys are computed at once, an int of at least "
            "1: pass e.g. 512"
        )
    return partial(attend_in_blocks, chunk=min(int(chunk), FAR))


def attend_in_blocks(
    q_BLnH: Tensor,
    k_BLgH: Tensor,
    v_BLgH: Tensor,
    *,
    chunk: int,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    sinks_n: Tensor | None = None,
    dropout: Dropout | None = None,
    first_head: int = 0,
    first_query: int = 0,
    first_key: int = 0,
) -> Tensor:
    """See :func:`blockwise_attend`; arguments and result are those of :func:`scaled_dot_product`."""
    q_BLnH, k_BLgH, v_BLgH = (cast_to_autocast(x) for x in (q_BLnH, k_BLgH, v_BLgH))
    q_BLnH, k_BLgH, v_BLgH, lost_BLn1 = without_padding(q_BLnH, k_BLgH, v_BLgH, key_padding_mask)
    pieces: list[int] = []
    if q_BLnH.numel() and k_BLgH.numel() and v_BLgH.numel():  # a kernel without a query, head or key ends the process
        lengths = index(q_BLnH.shape[1]), index(k_BLgH.shape[1])
        pieces = as_ints([Piece.whole(lengths, sides_of(is_causal, window))])
    out_BLnH, _ = torch.ops.sp_attention.attend_pieces(
        q_BLnH,
        k_BLgH,
        v_BLgH,
        attn_mask,
        key_padding_mask,
        sinks_n,
        None if dropout is None else dropout.seed,
        0.0 if dropout is None else dropout.p,
        [] if dropout is None else [dropout.first_head, dropout.first_query, dropout.first_key],
        pieces,
        q_BLnH.shape[3] ** -0.5 if scale is None else scale,
        chunk,
    )
    return with_lost_queries(out_BLnH, lost_BLn1)
