"""The default ``attend``: scaled_dot_product_attention with every option that one rank has."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from moe_dispatch.internals import cast_to_autocast, without_autocast

from ..blocks.dropout import Dropout
from ..dtypes import dtype_of_sums
from .blockwise import attend_in_blocks
from .masks import MergedMask, with_lost_queries, without_padding

CPU_ALIGNMENT_BYTES = 64
MOST_IN_FLASH = 256  # width of a head
# On the CPU what is not one call of torch's is computed in tiles of so many queries and keys, if it is more than one.
# At 2048 tokens, a head of 64, forward and backward take 0.16 (window of 64), 0.16 (sinks), 0.4 (dropout) and 0.6
# (padding, causal) of the time on whole tensors; in one tile of 512 x 512, 0.5 to 1.2.
TILE = 512


def scaled_dot_product(
    q_BLnH: Tensor,
    k_BLgH: Tensor,
    v_BLgH: Tensor,
    *,
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
    """Attention on whole sequences, batch first.

    Windows, padding, sinks, dropout and causal calls of other lengths are computed in tiles of 512 queries and keys
    on the CPU, where queries x keys are more than that: as :func:`blockwise_attend` does. Then there is no second
    derivative, as there is none in torch's own attention.

    Args:
        q_BLnH: (B, Lq, n, H).
        k_BLgH, v_BLgH: (B, Lk, g, H) and (B, Lk, g, Hv); g divides n.
        is_causal: aligned to the end: the last query sees every key.
        window: (left, right) keys before and after the query's own place, -1 for any; aligned as ``is_causal``.
        scale: of the products, default H ** -0.5.
        attn_mask: broadcasts to (B, n, Lq, Lk); bool (True attends), or added to the products.
        key_padding_mask: (B, Lk), True attends. Keys and values elsewhere may hold anything, NaN too. So may queries
            there, if Lq = Lk: a NaN of theirs is in their own output only, and in no gradient.
        sinks_n: (n,) a logit per head that takes weight and has no value.
        dropout: of the weights.
        first_head, first_query, first_key: for an ``attend`` that hands on all that it was told. Heads and places are
            alike here, so they change nothing.

    Returns:
        (B, Lq, n, Hv), in the dtype of autocast where that is on. A query with nothing to attend to gives 0,
        whatever it holds.
    """
    lengths = (q_BLnH.shape[1], k_BLgH.shape[1])
    options = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "sinks_n": sinks_n, "dropout": dropout}
    is_banded = window is not None or (is_causal and lengths[0] != lengths[1])
    is_plain = not is_banded and all(option is None for option in options.values())
    in_tiles = is_banded or any(option is not None for name, option in options.items() if name != "attn_mask")
    if in_tiles and q_BLnH.device.type == "cpu" and lengths[0] * lengths[1] > TILE * TILE:
        return attend_in_blocks(
            q_BLnH, k_BLgH, v_BLgH, chunk=TILE, is_causal=is_causal, window=window, scale=scale, **options
        )
    # ulysses_attention has cast before it sends. This is for a caller of this function alone: masks and the softmax
    # by hand need the dtype before torch's own function would cast.
    q_BLnH, k_BLgH, v_BLgH = (cast_to_autocast(x) for x in (q_BLnH, k_BLgH, v_BLgH))
    q_BLnH, k_BLgH, v_BLgH, lost_BLn1 = without_padding(q_BLnH, k_BLgH, v_BLgH, key_padding_mask)
    factor = q_BLnH.shape[3] ** -0.5 if scale is None else scale  # before the width is padded
    q_BnLH, k_BgLH, v_BgLH = (_heads_first(x) for x in (q_BLnH, k_BLgH, v_BLgH))
    widths = (q_BnLH.shape[3], v_BgLH.shape[3])
    if not takes_groups(q_BnLH.device.type, q_BnLH.dtype, widths, is_masked=not is_plain):
        k_BgLH, v_BgLH = (_for_each_query_head(x, q_BnLH.shape[1]) for x in (k_BgLH, v_BgLH))
    if is_plain:
        out_BnLH = F.scaled_dot_product_attention(
            q_BnLH, k_BgLH, v_BgLH, is_causal=is_causal, scale=factor, enable_gqa=True
        )
        return _tokens_first(out_BnLH, v_BLgH.shape[3])
    mask = MergedMask.of(lengths, is_causal, window, attn_mask, key_padding_mask, q_BLnH)
    q_BnLH = q_BnLH.masked_fill(mask.closed, 0.0)  # its gradient is 0, which times NaN would be NaN
    one_key_by_parts = lengths[1] == 1 and mask.values.requires_grad  # torch multiplies by parts where a mask learns
    if sinks_n is None and dropout is None and not one_key_by_parts:
        out_BnLH = F.scaled_dot_product_attention(
            q_BnLH,
            k_BgLH,
            v_BgLH,
            attn_mask=_mask_without_numbers(mask.values, q_BnLH),
            scale=factor,
            enable_gqa=True,
        )
    else:
        with without_autocast(q_BnLH):
            out_BnLH = _softmax_by_hand(q_BnLH, k_BgLH, v_BgLH, mask, factor, sinks_n, dropout)
    out_BLnH = _tokens_first(out_BnLH.masked_fill(mask.closed, 0.0), v_BLgH.shape[3])
    return with_lost_queries(out_BLnH, lost_BLn1)


def takes_groups(device_type: str, dtype: torch.dtype, widths: tuple[int, int], *, is_masked: bool) -> bool:
    """Whether torch's attention takes fewer key/value heads than query heads without making all products.

    On CUDA its flash kernel does, of 16 bits, for keys and values of one width up to 256, without a mask. What that
    leaves goes to the memory-efficient kernel, which wants as many of both, or with ``enable_gqa`` to a computation
    by parts, with (B, n, Lq, Lk) products in float32.

    Args:
        widths: H and Hv.
    """
    width, v_width = widths
    in_flash = dtype in (torch.float16, torch.bfloat16) and width == v_width <= MOST_IN_FLASH and not is_masked
    return device_type != "cuda" or in_flash


def _for_each_query_head(x_BgLH: Tensor, heads: int) -> Tensor:
    """(B, n, L, H). Backward sums over the copies of a head, low precision in float32, and rounds once."""
    shared = heads // max(x_BgLH.shape[1], 1)
    return x_BgLH if shared <= 1 else x_BgLH.unsqueeze(2).expand(-1, -1, shared, -1, -1).flatten(1, 2)


def _heads_first(x_BLnH: Tensor) -> Tensor:
    """(B, n, L, H), on CPU with zeros up to a whole number of 64 bytes.

    A CPU kernel's last bit depends on strides and alignment, so on the number of heads beside this one. Zeros change
    no product, and with them a head is the same bits on any number of ranks.
    """
    x_BnLH = rearrange(x_BLnH, "b l n h -> b n l h")
    if x_BnLH.device.type != "cpu":
        return x_BnLH
    return F.pad(x_BnLH.contiguous(), (0, -x_BnLH.shape[3] % (CPU_ALIGNMENT_BYTES // x_BnLH.itemsize)))


def _mask_without_numbers(values: Tensor, like: Tensor) -> Tensor:
    """On CUDA, what is added for a bool mask: torch makes it of numbers of the host, each a copy that waits."""
    if values.dtype != torch.bool or like.device.type != "cuda":
        return values
    return torch.zeros_like(values, dtype=like.dtype).masked_fill_(~values, -torch.inf)


def _tokens_first(out_BnLH: Tensor, width: int) -> Tensor:
    return rearrange(out_BnLH[..., :width], "b n l h -> b l n h")


def _softmax_by_hand(
    q_BnLH: Tensor,
    k_BgLH: Tensor,
    v_BgLH: Tensor,
    mask: MergedMask,
    scale: float,
    sinks_n: Tensor | None,
    dropout: Dropout | None,
) -> Tensor:
    """What scaled_dot_product_attention has no argument for; products and softmax in float32 (float64 for float64).

    The sink is one key more, whose value is 0; without sinks it is masked. So there are always two keys or more: with
    one, a CPU product over a single head takes another kernel, and another last bit, than over several.
    """
    dtype = dtype_of_sums(q_BnLH)
    heads = q_BnLH.shape[1]
    k_BnLH, v_BnLH = (
        F.pad(x.repeat_interleave(heads // x.shape[1], dim=1).to(dtype), (0, 0, 0, 1)) for x in (k_BgLH, v_BgLH)
    )
    products_BnLL = (q_BnLH.to(dtype) @ k_BnLH.mT * scale)[..., :-1]
    if mask.values.dtype == torch.bool:
        products_BnLL = products_BnLL.masked_fill(~mask.values, -torch.inf)
    else:
        products_BnLL = products_BnLL + mask.values.to(dtype)
    sinks_n = q_BnLH.new_full((heads,), -torch.inf) if sinks_n is None else sinks_n
    sinks_BnL1 = sinks_n.to(dtype)[None, :, None, None].expand(*products_BnLL.shape[:3], 1)
    weights_BnLL = torch.cat([products_BnLL, sinks_BnL1], dim=-1).softmax(-1)
    if dropout is not None:
        weights_BnLL = dropout.apply(weights_BnLL)
    return (weights_BnLL @ v_BnLH).to(q_BnLH.dtype)
