"""An ``attend`` of torch's FlexAttention: biases, soft caps and masks as functions of (batch, head, query, key)."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention

from moe_dispatch.internals import without_autocast

from ..dtypes import dtype_of_sums
from .masks import sides_of, with_lost_queries, without_padding

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ProductsShape = tuple[int, int, int, int]  # batch, heads at hand, queries, keys


def flex_attend(
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    attention: Callable[..., Tensor] = flex_attention,
) -> Callable[..., Tensor]:
    """Make an ``attend`` for :func:`ulysses_attention`.

    It honours ``is_causal``, ``window``, ``scale``, ``key_padding_mask`` and ``attn_mask``. It has no sinks and no
    dropout, so a call with them is refused. A query with nothing to attend to gives 0.

    Args:
        score_mod: ``score_mod(score, batch, head, query, key) -> score``, e.g. ``score + bias_N[head] * (key -
            query)`` or ``50 * tanh(score / 50)``. The head is the global one, whichever rank computes it. Query and
            key count from the start of the sequence (of the document, where there are documents).
        mask_mod: ``mask_mod(batch, head, query, key) -> bool``, True attends, together with the masks of the call.
        attention: ``flex_attention`` of ``torch.nn.attention.flex_attention``, or ``torch.compile`` of it: the fused
            kernel on a GPU, where the uncompiled one warns and needs the memory of all products.

    torch 2.13 has no backward of FlexAttention on the CPU. There, while autograd records, the same functions are
    evaluated on whole (B, n, L, L_kv) tensors instead, which means the same for elementwise operations and indexing.
    """

    def attend(
        q_BLnH: Tensor,
        k_BLgH: Tensor,
        v_BLgH: Tensor,
        *,
        is_causal: bool = False,
        window: tuple[int, int] | None = None,
        scale: float | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        first_head: int = 0,
        first_query: int = 0,
        first_key: int = 0,
    ) -> Tensor:
        """See :func:`flex_attend`; ``first_head`` is the global number of the first head at hand, ``first_query`` and
        ``first_key`` are the places of the first query and key."""
        firsts = (first_head, first_query, first_key)
        q_BLnH, k_BLgH, v_BLgH, lost_BLn1 = without_padding(q_BLnH, k_BLgH, v_BLgH, key_padding_mask)
        q_BnLH, k_BgLH, v_BgLH = (rearrange(x, "b l n h -> b n l h") for x in (q_BLnH, k_BLgH, v_BLgH))
        shape = (q_BnLH.shape[0], q_BnLH.shape[1], q_BnLH.shape[2], k_BgLH.shape[2])
        masks = _masks_of_call(shape, is_causal, window, key_padding_mask, attn_mask)
        if mask_mod is not None:
            masks.append(_of_global(mask_mod, firsts))
        mask, score = and_masks(*masks) if masks else None, _score(score_mod, firsts, attn_mask, shape)
        if q_BLnH.device.type == "cpu" and torch.is_grad_enabled():
            with without_autocast(q_BLnH):
                out_BnLH = _attend_on_whole_tensors(q_BnLH, k_BgLH, v_BgLH, score, mask, scale)
        else:
            whole = shape[2:]  # evaluated as a whole: for each batch row and head only where they differ
            per_row = shape[0] if key_padding_mask is not None or attn_mask is not None or mask_mod else None
            per_head = shape[1] if attn_mask is not None or mask_mod else None
            sizes = (per_row, per_head, *whole)
            block_mask = None if mask is None else create_block_mask(mask, *sizes, device=q_BLnH.device)
            out_BnLH = attention(
                q_BnLH, k_BgLH, v_BgLH, score_mod=score, block_mask=block_mask, scale=scale, enable_gqa=True
            )
        return with_lost_queries(rearrange(out_BnLH, "b n l h -> b l n h"), lost_BLn1)

    return attend


def _masks_of_call(
    shape: ProductsShape,
    is_causal: bool,
    window: tuple[int, int] | None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> list[MaskMod]:
    masks: list[MaskMod] = []
    _, _, queries, keys = shape
    left, right = sides_of(is_causal, window)
    if left >= 0:
        furthest = keys - queries - left
        masks.append(lambda b, h, q, k: k - q >= furthest)
    if right >= 0:
        last = keys - queries + right
        masks.append(lambda b, h, q, k: k - q <= last)
    if key_padding_mask is not None:
        masks.append(lambda b, h, q, k: key_padding_mask[b, k])
    if attn_mask is not None:
        allowed_BnLL = (attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf).expand(shape)
        masks.append(lambda b, h, q, k: allowed_BnLL[b, h, q, k])
    return masks


def _of_global(mask_mod: MaskMod, firsts: tuple[int, int, int]) -> MaskMod:
    """``mask_mod`` of global heads and places; ``firsts``: the first head, query and key at hand."""
    head, query, key = firsts
    return lambda b, h, q, k: mask_mod(b, h + head, q + query, k + key)


def _score(
    score_mod: ScoreMod | None, firsts: tuple[int, int, int], attn_mask: Tensor | None, shape: ProductsShape
) -> ScoreMod:
    """``score_mod`` of global heads and places, then the float mask."""
    head, query, key = firsts
    is_bias = attn_mask is not None and attn_mask.is_floating_point()
    bias_BnLL = attn_mask.expand(shape) if attn_mask is not None and is_bias else None

    def score(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        s = s if score_mod is None else score_mod(s, b, h + head, q + query, k + key)
        return s if bias_BnLL is None else s + bias_BnLL[b, h, q, k]

    return score


def _attend_on_whole_tensors(
    q_BnLH: Tensor, k_BgLH: Tensor, v_BgLH: Tensor, score: ScoreMod, mask: MaskMod | None, scale: float | None
) -> Tensor:
    """What flex_attention computes, with a gradient on any device; in float32, or float64 for float64."""
    dtype, out_dtype = dtype_of_sums(q_BnLH), q_BnLH.dtype
    heads = q_BnLH.shape[1]
    k_BnLH, v_BnLH = (x.to(dtype).repeat_interleave(heads // x.shape[1], dim=1) for x in (k_BgLH, v_BgLH))
    sizes = (*q_BnLH.shape[:3], k_BnLH.shape[2])
    index = [torch.arange(size, device=q_BnLH.device).view(-1, *(1,) * (3 - dim)) for dim, size in enumerate(sizes)]
    open_BnLL = None if mask is None else mask(*index)
    q_BnLH = q_BnLH.to(dtype)
    if open_BnLL is not None:  # the gradient of a query without a key is 0, which times NaN would be NaN
        q_BnLH = q_BnLH.masked_fill(~open_BnLL.any(-1, keepdim=True), 0.0)
    product_BnLL = q_BnLH @ k_BnLH.mT * (q_BnLH.shape[3] ** -0.5 if scale is None else scale)
    product_BnLL = score(product_BnLL, *index).to(dtype)
    if open_BnLL is not None:
        product_BnLL = product_BnLL.masked_fill(~open_BnLL, -torch.inf)
    closed_BnL1 = (product_BnLL == -torch.inf).all(-1, keepdim=True)
    weight_BnLL = product_BnLL.masked_fill(closed_BnL1, 0.0).softmax(-1).masked_fill(closed_BnL1, 0.0)
    return (weight_BnLL @ v_BnLH).to(out_dtype)
