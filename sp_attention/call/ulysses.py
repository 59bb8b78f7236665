"""Ulysses attention: exchange tokens for heads, attend on whole sequences, exchange back.

Source: DeepSpeed-Ulysses (arXiv:2309.14509). Two collectives forward (queries, keys and values travel together; the
output back) and two backward.
"""

from functools import partial

import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.internals import Statement, uncompiled

from ..attend.default import scaled_dot_product
from ..attend.documents import Documents, attend_documents
from ..attend.empty import attend_or_zeros, zeros
from ..work.scheme import ULYSSES
from .attend_arguments import FIRST_HEAD, takes
from .inputs import AttentionInputs
from .options import (
    Given,
    facts_of_call,
    given_options,
    options_of_my_heads,
    options_of_part,
    problem_of_attend,
    problem_of_options,
    seed_of,
)
from .outcome import HAS_OUTPUT, Attend, RecomputedSoFar, output_or_problem
from .words import inputs_to_heads, output_to_tokens


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
        attend: ``attend(q_BLnH, k_BLgH, v_BLgH, **options) -> out_BLnH``; :func:`scaled_dot_product` if left out. It
            gets whole sequences (whole documents), batch first, and this rank's heads. k and v have whole groups, or
            one head per query head where a group straddles ranks. It gets the options that were given, and is
            refused if it has no argument of such a name: ``is_causal``, ``window``, ``scale``, ``attn_mask`` (four
            dimensions, my heads), ``key_padding_mask``, ``sinks_n`` (my heads) and ``dropout``, whose ``apply`` takes
            (B, n, L, L_kv) weights. If it has an argument ``first_head``, or takes any (``**options``), it gets the
            global number of its first query head. The arguments of a module are those of its ``forward``.
        is_causal: aligned to the end where lengths differ: the last query sees every key.
        window: (left, right), -1 for any, on places in the whole sequence (in the document).
        scale: of the products; H ** -0.5 if left out.
        attn_mask: broadcasts to (B, N, L, L_kv), the same on every rank: bool (True attends), or added to the
            products (-inf does not attend; NaN gives NaN). Each rank's gradient of a learned one has its own heads,
            so sum it over the ranks.
        key_padding_mask: (B, L_kv) bool, the same on every rank, True attends. Keys and values elsewhere may hold
            anything; so may queries there, if L = L_kv: a NaN of theirs is in their own output only, and in no
            gradient.
        cu_seqlens: (documents + 1,) ints of any dtype, for B = 1: document i has ``diff(cu_seqlens)[i]`` real tokens
            and attends within itself. Pass it on the CPU: it is read there.
        cu_seqlens_padded: (documents + 1,) where each document starts in the packed sequence; ``cu_seqlens`` if left
            out. What lies between documents and after the last is padding: it is never a key, and its outputs and
            gradients are 0, whatever it holds.
        dropout_p: fraction of the weights dropped, in a pattern that does not depend on the number of ranks. The seed
            comes from the random state of the group's first rank.
        sinks_N: (N,) a learned logit per query head that takes weight and has no value; each rank's gradient has its
            own heads, so sum it over the ranks.

    Returns:
        ``out_BlNH``: (B, l, N, Hv), or (l, B, N, Hv), of the dtype of the queries; under ``torch.autocast`` of its
        dtype, to which q, k and v are cast before they travel (not float64). A query with nothing to attend to gives
        0.

    Under ``torch.compile`` lengths, heads and options are constants of the graph, so others compile anew (leave
    ``dynamic`` alone, or False); documents are a graph break.

    Raises:
        GroupError: a ValueError with the same text on every rank; the group stays usable. A rank has something wrong,
            and is named: a shape that is not its shard, an option of a wrong type, an ``attend`` that raises or gives
            another shape or dtype. Or the ranks disagree: in sharding, heads, options or documents. On CUDA the peers
            of a rank that is wrong get a device assertion instead, and in compiled code all ranks do.
        ValueError: before any collective. An option that ``attend`` does not take. Or what decides how much a rank
            has to send: tensors of another number of dimensions, head counts that fit nothing, a sharding or group
            that cannot be.
    """
    given = given_options(
        is_causal=is_causal,
        window=window,
        scale=scale,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        sinks_N=sinks_N,
        dropout_p=dropout_p,
    )
    tensors, shardings = (q_BlNH, k_BlGH, v_BlGH), (sharding, kv_sharding)
    attend = scaled_dot_product if attend is None else attend  # a module may have no truth, or no length
    if cu_seqlens is None and cu_seqlens_padded is None:
        inputs = AttentionInputs.of(*tensors, *shardings, heads, group, ULYSSES)
        return exchange_and_attend(inputs, attend, given, seed_of(given, inputs.device))
    return _attend_documents_over_ranks(
        tensors, shardings, heads, group, attend, given, cu_seqlens, cu_seqlens_padded
    )


@uncompiled("cu_seqlens are read: each batch of documents would be another graph")
def _attend_documents_over_ranks(
    tensors: tuple[Tensor, Tensor, Tensor],
    shardings: tuple[TokenSharding, TokenSharding | None],
    heads: Partition | None,
    group: dist.ProcessGroup,
    attend: Attend,
    given: Given,
    cu_seqlens: Tensor | None,
    cu_seqlens_padded: Tensor | None,
) -> Tensor:
    inputs = AttentionInputs.of(*tensors, *shardings, heads, group, ULYSSES)
    documents, problem = Documents.read(cu_seqlens, cu_seqlens_padded, inputs.sharding.batch.total, inputs.lengths)
    seed = seed_of(given, inputs.device)
    return exchange_and_attend(inputs, attend, given, seed, documents, problem)


def exchange_and_attend(
    inputs: AttentionInputs,
    attend: Attend,
    given: Given,
    seed: Tensor,
    documents: Documents | None = None,
    problem: str = "",
) -> Tensor:
    """Exchange to heads, ``attend`` on what this rank got, and exchange back.

    Args:
        seed: () int64; that of the group's first rank is used.
        problem: of the documents.
    """
    if refusal := problem_of_attend(attend, given):  # every rank has the same attend, and sees it
        raise ValueError(refusal)
    problem = inputs.problem or problem_of_options(given, inputs) or problem
    statement = Statement("" if problem else facts_of_call(inputs, given, documents), problem)
    q_BLnH, k_BLgH, v_BLgH, seed = inputs_to_heads(inputs, statement, seed)
    if problem:  # in compiled code, where the graph has to be whole to raise when it runs
        return output_to_tokens(zeros(q_BLnH.shape[1], q_BLnH, v_BLgH), inputs, Statement(HAS_OUTPUT, problem))
    options = options_of_my_heads(given, inputs, seed)
    if takes(attend, FIRST_HEAD):
        options[FIRST_HEAD] = inputs.first_head
    attend_whole = attend_or_zeros
    if documents is not None:
        attend_whole = partial(attend_documents, documents=documents, options_of_part=options_of_part)
    attend_all = partial(attend_whole, attend, q_BLnH, k_BLgH, v_BLgH, options)
    out_BLnH, statement = output_or_problem(attend_all, q_BLnH, v_BLgH.shape[3])
    return output_to_tokens(RecomputedSoFar.apply(out_BLnH), inputs, statement)  # type: ignore[arg-type]
