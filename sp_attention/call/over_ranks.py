"""Attention over ranks in any scheme."""

from functools import partial

import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.internals import check_is_group, device_for, uncompiled

from ..attend.default import scaled_dot_product
from ..work.scheme import ULYSSES, Scheme
from .inputs import AttentionInputs
from .options import given_options
from .outcome import Attend
from .spread_call import Asking
from .ulysses import exchange_and_attend


@uncompiled("who needs which rows is worked out in Python, and kept")
def attention_over_ranks(
    q_BlNH: Tensor,
    k_BlGH: Tensor,
    v_BlGH: Tensor,
    *,
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
    """Attention of sequences that are spread over ranks, equal to attention on one rank, in any scheme.

    Arguments, result and guarantees are those of :func:`ulysses_attention`, but for these:

    Args:
        q_BlNH: (B, l, N, H), or (l, B, N, H) for order "LB": this rank's queries, all heads.
        k_BlGH, v_BlGH: (B, l, G, H) and (B, l, G, Hv).
        sharding: which tokens each rank of ``group`` holds, in any order: see ``TokenSharding.zigzag``.
        group: the process group.
        scheme: how the work is spread; see :class:`Scheme`. The result is the same, but for rounding.
        heads: query heads of each rank that shares them: of each rank of a team; see :class:`Scheme`.
        attend: as there, for all schemes but those with ring keys or a chunk, whose keys it would not see at once. If
            it has arguments ``first_query`` and ``first_key``, it gets the places of its first query and key in the
            sequence (in the document). It is called for consecutive queries, with those keys that they see. So
            ``is_causal`` and ``window`` are on places from the end, as ever. It may not write to q, k and v.
        attn_mask, sinks_N: each rank's gradient of what is learned there is that of its own queries and heads, so sum
            it over the ranks.

    Returns:
        ``out_BlNH``: (B, l, N, Hv), or (l, B, N, Hv), as there.

    Without ``attend`` the work is computed in tiles, as by :func:`blockwise_attend`, with no second derivative; in
    Ulysses by :func:`scaled_dot_product`.

    Collectives: one of 16 bytes per pair of ranks first; one for each turn of keys, the queries with the first; one
    for the output where queries travel, or an ``attend`` may fail. Under ``torch.compile`` the call is a graph break.

    Raises:
        GroupError: a ValueError with the same text on every rank; the group stays usable. A rank has anything wrong,
            or the ranks disagree, in the scheme too. On CUDA the peers of a rank that is wrong get a device assertion
            instead.
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
    tensors, shardings = (q_BlNH, k_BlGH, v_BlGH), (sharding, kv_sharding)
    inputs_of = partial(AttentionInputs.of, *tensors, *shardings, heads, group, scheme)
    call = asking.of_all_ranks(inputs_of, device_for(tensors, group))
    if scheme.is_ulysses(group.size()):
        attend = scaled_dot_product if attend is None else attend
        return exchange_and_attend(call.inputs, attend, given, call.seed, call.documents)
    return call.in_tiles() if attend is None else call.by_attend(attend)
