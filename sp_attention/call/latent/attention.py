"""Attention over ranks whose keys and values are made of narrow latents, which are what travels."""

from collections.abc import Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.internals import check_is_group, device_for, uncompiled

from ...spread.expansion import Expand
from ...work.scheme import ULYSSES, Scheme
from ..options import given_options
from ..outcome import Attend
from ..spread_call import Asking
from .inputs import Latent, LatentInputs


@uncompiled("who needs which rows is worked out in Python, and kept")
def latent_attention_over_ranks(
    q_BlNH: Tensor,
    latent_BlC: Tensor,
    *,
    expand: Expand,
    weights: Sequence[Tensor] = (),
    kv_heads: int | None = None,
    sharding: TokenSharding,
    group: dist.ProcessGroup,
    scheme: Scheme = ULYSSES,
    kv_sharding: TokenSharding | None = None,
    heads: Partition | None = None,
    attend: Attend | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_padded: Tensor | None = None,
    dropout_p: float = 0.0,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """:func:`attention_over_ranks` with keys and values that are a function of a latent, each token's of its own.

    The latent travels, and is expanded where it is used: multi-head latent attention has 576 values a token instead
    of 40,960. Source: DeepSeek-V2 (arXiv:2405.04434). Arguments, result and guarantees are those of
    :func:`attention_over_ranks`, but for these:

    Args:
        q_BlNH: (B, l, N, H), or (l, B, N, H) for order "LB": this rank's queries, all heads.
        latent_BlC: (B, l, C), or (l, B, C).
        expand: ``expand(latent_BLC, *weights, heads) -> (k_BLgH, v_BLgV)`` for any B and L, batch first: the keys and
            values of the key/value heads ``heads``, a range of g of the G, in the dtype of the queries. What it gives
            for a token depends on that token's latent and on nothing else, so it draws nothing; positions are in the
            latent, or in the part of it that was rotated before. It runs under the caller's autocast. In backward it
            is called again.
        weights: tensors that ``expand`` gets after the latents. Their gradients are those of this rank's queries and
            heads, so sum them over the ranks. If ``expand`` has a tensor from elsewhere that wants a gradient, it is
            refused.
        kv_heads: G, which divides N; N if left out.

    Returns:
        ``out_BlNH``: (B, l, N, Hv), or (l, B, N, Hv), as there.

    Every rank of a team gets the whole latents that its queries need, C values a token for all of its heads. With
    tiles, keys and values exist for at most 512 tokens (``chunk``, if it is less) at once, in backward too. An
    ``attend`` of the caller's gets them whole.

    Before anything travels ``expand`` is tried on two tokens of zeros. Latents at padding are zeros when they are
    expanded.

    Raises:
        GroupError: as there; also no ``expand``, one that raises or gives another shape or dtype, or a latent of
            another width on one rank.
        ValueError: a group that cannot be.
    """
    check_is_group(group)
    given = given_options(
        is_causal=is_causal,
        window=window,
        scale=scale,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        sinks_N=sinks_N,
        dropout_p=dropout_p,
    )
    asking = Asking(
        scheme=scheme,
        attend=attend,
        group=group,
        given=given,
        cu_seqlens=cu_seqlens,
        cu_seqlens_padded=cu_seqlens_padded,
    )
    latent = Latent(latent_BlC=latent_BlC, expand=expand, weights=weights, kv_heads=kv_heads)
    inputs_of = partial(LatentInputs.of, q_BlNH, latent, sharding, kv_sharding, heads, group, scheme)
    call = asking.of_all_ranks(inputs_of, device_for([q_BlNH, latent_BlC], group))
    return call.in_tiles() if attend is None else call.by_attend(attend)
