"""What may attend to what: the masks of one call in one tensor."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MergedMask:
    """All masks of a call together: causal, window, ``attn_mask`` and ``key_padding_mask``.

    Attributes:
        values: broadcasts to (B, n, Lq, Lk); bool (True attends), or added to the products. A query with no key has
            all of them, so that no softmax is over nothing.
        closed: broadcasts to (B, n, Lq, 1); bool, True for those queries.
    """

    values: Tensor
    closed: Tensor

    @classmethod
    def of(
        cls,
        lengths: tuple[int, int],
        is_causal: bool,
        window: tuple[int, int] | None,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        like: Tensor,
    ) -> "MergedMask":
        """Merge them.

        Args:
            lengths: (Lq, Lk).
            is_causal, window, attn_mask, key_padding_mask: as ``attend`` takes them.
            like: a tensor of the device and dtype of the products.
        """
        allowed = allowed_by_place(lengths, is_causal, window, like.device)[None, None]
        if key_padding_mask is not None:
            allowed = allowed & key_padding_mask[:, None, None, :]
        if attn_mask is None or attn_mask.dtype == torch.bool:
            values = allowed if attn_mask is None else allowed & attn_mask
            closed = ~values.any(-1, keepdim=True)
            return cls(values | closed, closed)
        # Cast first: the lowest float32, a usual way to say "no", is -inf in bfloat16.
        attn_mask = attn_mask.to(like.dtype)
        allowed = allowed & (attn_mask != -torch.inf)  # so NaN attends, and shows
        closed = ~allowed.any(-1, keepdim=True)
        values = attn_mask.masked_fill(~allowed, -torch.inf).masked_fill(closed, 0.0)
        return cls(values, closed)


def allowed_by_place(
    lengths: tuple[int, int], is_causal: bool, window: tuple[int, int] | None, device: torch.device
) -> Tensor:
    """(Lq, Lk) bool: what causal and window allow, with the last query at the place of the last key.

    Triangles of bools: to compare places would make a matrix of ints first, 8.6 GB at 32k x 32k, where this has 1.1.
    """
    queries, keys = lengths
    left, right = sides_of(is_causal, window)
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if left >= 0:
        allowed = allowed.triu(keys - queries - min(left, keys))
    if right >= 0:
        allowed = allowed.tril(keys - queries + min(right, queries))
    return allowed


def sides_of(is_causal: bool, window: tuple[int, int] | None) -> tuple[int, int]:
    """How many keys before and after its own place a query may see; -1 for any."""
    left, right = window if window is not None else (-1, -1)
    return left, 0 if is_causal else right


def without_padding(
    q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Keys and values with 0 at padding, and queries with 0 where one at padding is NaN or infinite: a weight or a
    gradient of 0 times NaN is NaN, and would reach real tokens.

    Returns:
        The queries, keys and values, and where queries were replaced: (B, L, n, 1) bool for
        :func:`with_lost_queries`; None where the mask tells of no query.
    """
    if key_padding_mask is None:
        return q_BLnH, k_BLgH, v_BLgH, None
    k_BLgH, v_BLgH = (keys_without_padding(x, key_padding_mask) for x in (k_BLgH, v_BLgH))
    if q_BLnH.shape[1] != k_BLgH.shape[1]:
        return q_BLnH, k_BLgH, v_BLgH, None
    q_BLnH, lost_BLn1 = queries_without_padding(q_BLnH, key_padding_mask)
    return q_BLnH, k_BLgH, v_BLgH, lost_BLn1


def keys_without_padding(x_BLgH: Tensor, keep_BL: Tensor) -> Tensor:
    """0 where ``keep_BL`` is False."""
    return x_BLgH.masked_fill(~keep_BL[:, :, None, None], 0.0)


def queries_without_padding(q_BLnH: Tensor, keep_BL: Tensor) -> tuple[Tensor, Tensor]:
    """0 where ``keep_BL`` is False and a query is NaN or infinite; and (B, L, n, 1) bool, where that is."""
    lost_BLn1 = ~keep_BL[:, :, None, None] & ~q_BLnH.isfinite().all(-1, keepdim=True)
    return q_BLnH.masked_fill(lost_BLn1, 0.0), lost_BLn1


def with_lost_queries(out_BLnH: Tensor, lost_BLn1: Tensor | None) -> Tensor:
    """NaN where there was NaN, as its own output, and without a gradient. What is 0 had nothing to attend to, and
    stays."""
    if lost_BLn1 is None:
        return out_BLnH
    return out_BLnH.masked_fill(lost_BLn1 & (out_BLnH != 0).any(-1, keepdim=True), torch.nan)
