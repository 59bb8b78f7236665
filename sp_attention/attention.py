"""Ulysses attention: trade tokens for heads, attend on whole sequences, trade back.

Source: DeepSpeed-Ulysses (arXiv:2309.14509). Two collectives forward (queries, keys and values travel together; the
output back) and two backward.
"""

import inspect
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding

from .attend import scaled_dot_product
from .call import Call
from .documents import Documents, attend_documents, attend_or_zeros
from .dropout import Dropout
from .exchange import Lane, collect
from .options import check_honoured, described, of_my_heads, problem_of
from .status import spread_with_status

Attend = Callable[..., Tensor]


def ulysses_attention(
    q_BlNH: Tensor,
    k_BlGH: Tensor,
    v_BlGH: Tensor,
    *,
    sharding: TokenSharding,
    group: dist.ProcessGroup,
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
    """Attention of sequences that are spread over ranks, equal to attention on one rank.

    Args:
        q_BlNH: (B, l, N, H), or (l, B, N, H) for order "LB": this rank's queries, all heads.
        k_BlGH, v_BlGH: (B, l, G, H) and (B, l, G, Hv); G divides N, and query head i uses key/value head i // (N /
            G).
        sharding: which tokens each rank of ``group`` holds; its batch is not cut.
        group: the sequence-parallel process group.
        kv_sharding: of keys and values, for cross-attention; the sharding of the queries if left out.
        heads: query heads of each rank; ``Partition.balanced(N, ranks)`` if left out. A rank without heads takes
            part.
        attend: ``attend(q_BLnH, k_BLgH, v_BLgH, **options) -> out_BLnH`` on whole sequences (whole documents), batch
            first, my heads; k and v have whole groups, or one head per query head where a group straddles ranks.
            Options are those that were given; an ``attend`` without an argument of that name is refused. One with an
            argument ``first_head`` is told the global number of its first query head. :func:`scaled_dot_product` if
            left out.
        is_causal: aligned to the end where lengths differ: the last query sees every key.
        window: (left, right), -1 for any, on places in the whole sequence (in the document).
        scale: of the products; H ** -0.5 if left out.
        attn_mask: broadcasts to (B, N, L, L_kv), the same on every rank: bool (True attends), or added to the
            products.
        key_padding_mask: (B, L_kv) bool, the same on every rank, True attends.
        cu_seqlens: (documents + 1,) ints, for B = 1: document i has ``diff(cu_seqlens)[i]`` real tokens and attends
            within itself. Pass it on the CPU: it is read there.
        cu_seqlens_padded: (documents + 1,) where each document starts in the packed sequence; ``cu_seqlens`` if left
            out. What lies between documents and after the last is padding: it is never a key, and its outputs and
            gradients are 0, whatever it holds.
        dropout_p: fraction of the weights dropped, in a pattern that does not depend on the number of ranks. The seed
            comes from the random state of the group's first rank.
        sinks_N: (N,) a learned logit per query head that takes weight and has no value; each rank's gradient has its
            own heads, so sum it over the ranks.

    Returns:
        ``out_BlNH``: (B, l, N, Hv), or (l, B, N, Hv). A query with nothing to attend to gives 0.

    Raises:
        ValueError: on every rank. What all ranks can see is raised before any collective; what only one can see (a
            shape that is not its shard, other documents than its peers have) travels with the queries, names the
            rank, and leaves the group usable.
    """
    call = Call.of(q_BlNH, k_BlGH, v_BlGH, sharding, kv_sharding, heads, group)
    attend = attend or scaled_dot_product
    given = {
        "is_causal": is_causal or None,
        "window": window,
        "scale": scale,
        "attn_mask": attn_mask,
        "key_padding_mask": key_padding_mask,
        "sinks_n": sinks_N,
        "dropout": Dropout(p=dropout_p) if dropout_p else None,
    }
    options = {name: value for name, value in given.items() if value is not None}
    check_honoured(attend, options)
    problem, documents = call.problem or problem_of(options, call), None
    if cu_seqlens is not None:
        problem = problem or Documents.problem_of_tensors(cu_seqlens, cu_seqlens_padded)
        if not problem:
            documents = Documents.of(cu_seqlens, cu_seqlens_padded)
            problem = documents.problem(sharding.batch.total, call.lengths)
    elif cu_seqlens_padded is not None:
        problem = (
            problem or "cu_seqlens_padded without cu_seqlens; pass both, or cu_seqlens alone where nothing is padded"
        )
    facts = f"{call.facts}; {described(options)}; {documents or 'one document'}"
    seed = torch.randint(torch.iinfo(torch.int64).max, ()) if dropout_p else torch.zeros((), dtype=torch.int64)
    q_BLnH, k_BLgH, v_BLgH, seed = spread_with_status(call, facts, problem, seed)
    options = of_my_heads(options, seed, call)
    if "first_head" in inspect.signature(attend).parameters:
        options["first_head"] = call.heads.query.offsets[call.rank]
    if documents is None:
        out_BLnH = attend_or_zeros(attend, q_BLnH, k_BLgH, v_BLgH, options)
    else:
        out_BLnH = attend_documents(attend, q_BLnH, k_BLgH, v_BLgH, options, documents)
    wanted = (*q_BLnH.shape[:3], v_BLgH.shape[3])
    if tuple(out_BLnH.shape) != wanted:
        raise ValueError(f"attend gave {tuple(out_BLnH.shape)}, but (B, L, my query heads, value width) is {wanted}")
    out_BLnH = out_BLnH if sharding.order == "BL" else out_BLnH.transpose(0, 1)
    return collect(out_BLnH, Lane(sharding=sharding, heads=call.heads.query), group)
