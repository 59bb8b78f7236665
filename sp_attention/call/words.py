"""The two exchanges of a call, each with a word from every rank on how it fares: so one rank's mistake is the same
error on all of them, and nobody waits for a peer that left.

On CUDA and in compiled code, reading the words would be a host sync in every layer. There a device assertion reads
them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dispatch.internals import BAD, Statement, digest

from ..wire import exchange
from .tensors import Call

GOOD = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank has no output, and the exception that it comes from, if one was raised."""

    problem: str
    cause: Exception | None = None


def spread(call: Call, facts: str, problem: str, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Trade tokens for heads, and make sure that all ranks mean the same call. 16 bytes more for each pair of ranks.

    Args:
        call: the tensors and how they travel.
        facts: what all ranks have to agree about.
        problem: what is wrong on this rank; empty where nothing is.
        seed: () int64 of this rank, on the device of the tensors.

    Returns:
        ``q_BLnH``, ``k_BLgH``, ``v_BLgH``, batch first, and the seed of the group's first rank.

    Raises:
        ValueError: the same text on every rank, if one has a problem or they disagree. On CUDA only on a rank that
            knows of a problem: its peers have a device assertion.
    """
    expected = constant_digest(facts)
    word = BAD if problem else expected
    # Made on the device, as all index tensors here: a copy from the host would wait for it in every layer.
    header_2 = torch.stack([torch.full((), word, device=call.device), seed])
    q_BlNH, k_BlGH, v_BlGH = call.stand_ins() if problem else call.tensors
    sent = [q_BlNH, call.heads.kv_by_rank(k_BlGH), call.heads.kv_by_rank(v_BlGH)]
    traded, headers = exchange.spread(sent, call.lanes, call.group, header_2.view(q_BlNH.dtype))
    header_P2 = headers.view(torch.int64)
    check_words(header_P2[:, 0], expected, call, facts, problem)
    if call.sharding.order == "LB":
        traded = [x.transpose(0, 1) for x in traded]
    q_BLnH, k_BLgH, v_BLgH = traded
    k_BLgH, v_BLgH = (call.heads.kv_for_queries(x, call.rank) for x in (k_BLgH, v_BLgH))
    return q_BLnH, k_BLgH, v_BLgH, header_P2[0, 1]


def collect(out_BLnH: Tensor, call: Call, failure: Failure | None) -> Tensor:
    """Trade heads for tokens, and make sure that every rank has attended. 8 bytes more for each pair of ranks.

    Args:
        out_BLnH: batch first; anything of the right shape and dtype where there is a failure.
        failure: why this rank has no output.

    Raises:
        ValueError: as :func:`spread`; on a rank with a failure, from its cause.
    """
    word_1 = torch.full((1,), BAD if failure else GOOD, device=call.device)
    lane = exchange.Lane(sharding=call.sharding, heads=call.heads.query)
    out_BLnH = out_BLnH if call.sharding.order == "BL" else out_BLnH.transpose(0, 1)
    out_BlNH, headers = exchange.collect(out_BLnH, lane, call.group, word_1.view(out_BLnH.dtype))
    problem, cause = (failure.problem, failure.cause) if failure else ("", None)
    check_words(headers.view(torch.int64)[:, 0], GOOD, call, "it has an output", problem, cause)
    return out_BlNH


def check_words(
    word_P: Tensor, expected: int, call: Call, facts: str, problem: str, cause: Exception | None = None
) -> None:
    """Raise on every rank unless all sent the word that this rank expects."""
    if word_P.device.type == "cpu" and not torch.compiler.is_compiling():
        if set(word_P.tolist()) != {expected}:
            Statement(facts, problem, cause).raise_on_every_rank(device=word_P.device, group=call.group)
        return
    if problem and not torch.compiler.is_compiling():
        raise ValueError(f"rank {call.rank}: {problem}") from cause
    torch.ops.aten._assert_async.msg(
        (word_P == expected).all(), "sp_attention: the ranks disagree, or one has a problem"
    )


@torch.compiler.assume_constant_result
def constant_digest(facts: str) -> int:
    """The digest, made while compiling: dynamo traces no hash of a text, and the facts are constants of the graph."""
    return digest(facts)
