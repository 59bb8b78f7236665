"""The two exchanges of a call. With each, every rank sends its word: see ``Statement`` in moe_dispatch. So one rank's
mistake is the same error on all ranks, and no rank waits for a peer that left.

On CUDA and in compiled code, reading the words would be a host sync in every layer. There a device assertion reads
them.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch.internals import BAD, Statement, constant_in_graphs, digest, exchange_rows

from ..wire.exchange import to_heads, to_tokens
from ..wire.ints_as_floats import as_floats, as_ints
from ..wire.order import batch_first, in_order
from ..wire.splits import Split
from .inputs import AttentionInputs


def inputs_to_heads(
    inputs: AttentionInputs, statement: Statement, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """My tokens of q, k and v, all heads -> all tokens, my heads. Makes sure that all ranks mean the same call.

    One collective. The words and seeds are 16 numbers per pair of ranks in it.

    Args:
        inputs: q, k and v of this rank. Where this rank has a problem, zeros are sent instead.
        statement: what this rank believes about the call.
        seed: () int64 of this rank, on the device of the tensors.

    Returns:
        ``q_BLnH``, ``k_BLgH``, ``v_BLgH``, batch first, and the seed of the group's first rank.

    Raises:
        ValueError: the same text on every rank, if one has a problem or they disagree. On CUDA only on a rank that
            knows of a problem: its peers have a device assertion.
    """
    word = word_of(statement)
    # Made on the device, as all index tensors here: a copy from the host would wait for it in every layer.
    header_2 = torch.stack([torch.full((), word, device=inputs.device), seed])
    q_BlNH, k_BlGH, v_BlGH = inputs.stand_ins() if statement.problem else inputs.tensors
    sent = [q_BlNH, inputs.heads.kv_by_rank(k_BlGH), inputs.heads.kv_by_rank(v_BlGH)]
    wholes, headers = to_heads(sent, inputs.splits, inputs.group, as_floats(header_2, q_BlNH.dtype))
    header_P2 = as_ints(headers)
    check_words(header_P2[:, 0], statement, inputs.group)
    q_BLnH, k_BLgH, v_BLgH = (batch_first(x, inputs.sharding) for x in wholes)
    k_BLgH, v_BLgH = (inputs.heads.kv_for_queries(x, inputs.rank) for x in (k_BLgH, v_BLgH))
    return q_BLnH, k_BLgH, v_BLgH, header_P2[0, 1]


def output_to_tokens(out_BLnH: Tensor, inputs: AttentionInputs, statement: Statement) -> Tensor:
    """All tokens of the output, my heads -> my tokens, all heads. Makes sure that every rank has an output.

    One collective. The words are 8 numbers per pair of ranks in it.

    Args:
        out_BLnH: batch first. Where there is a problem, anything of the right shape and dtype.
        inputs: what the output was computed from.
        statement: the same facts on every rank; the problem says why this rank has no output.

    Returns:
        ``out_BlNH``: (B, l, N, Hv), or (l, B, N, Hv) for order "LB".

    Raises:
        ValueError: as :func:`inputs_to_heads`; on a rank with a problem, from its cause.
    """
    word_1 = torch.full((1,), word_of(statement), device=inputs.device)
    split = Split(sharding=inputs.sharding, heads=inputs.heads.query)
    out_BLnH = in_order(out_BLnH, inputs.sharding)
    out_BlNH, headers = to_tokens(out_BLnH, split, inputs.group, as_floats(word_1, out_BLnH.dtype))
    check_words(as_ints(headers)[:, 0], statement, inputs.group)
    return out_BlNH


def words_first(statement: Statement, seed: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Make sure that all ranks mean the same call before anything travels whose size depends on it. One collective of
    16 bytes per pair of ranks.

    Args:
        statement: what this rank believes about the call.
        seed: () int64 of this rank, on the device that the group communicates on.

    Returns:
        The seed of the group's first rank.

    Raises:
        ValueError: as :func:`inputs_to_heads`.
    """
    header_2 = torch.stack([torch.full((), statement.word, device=seed.device), seed])
    ones = (1,) * group.size()
    header_P2 = exchange_rows(header_2.expand(group.size(), 2), ones, ones, group)
    check_words(header_P2[:, 0], statement, group)
    return header_P2[0, 1]


def check_words(word_P: Tensor, statement: Statement, group: dist.ProcessGroup) -> None:
    """Raise on every rank unless all of them sent the word that this rank expects."""
    if word_P.device.type == "cpu" and not torch.compiler.is_compiling():
        statement.check(word_P.tolist(), device=word_P.device, group=group)
        return
    if statement.problem and not torch.compiler.is_compiling():
        raise ValueError(f"rank {group.rank()}: {statement.problem}") from statement.cause
    torch.ops.aten._assert_async.msg(
        (word_P == constant_digest(statement.facts)).all(), "sp_attention: the ranks disagree, or one has a problem"
    )


def word_of(statement: Statement) -> int:
    """``statement.word``, also while torch.compile traces."""
    return BAD if statement.problem else constant_digest(statement.facts)


@constant_in_graphs
def constant_digest(facts: str) -> int:
    """The digest, made while compiling: dynamo traces no hash of a text, and the facts are constants of the graph."""
    return digest(facts)
