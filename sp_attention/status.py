"""Queries, keys, values and each rank's status word in one collective."""

import torch
from torch import Tensor

from moe_dispatch import BAD, digest, raise_on_every_rank

from .call import Call
from .exchange import spread

HEADER_WORDS = 2  # status and seed, int64: 16 bytes for each pair of ranks


def spread_with_status(call: Call, facts: str, problem: str, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Trade tokens for heads, and make sure that all ranks mean the same call.

    Args:
        call: the tensors and how they travel.
        facts: what all ranks have to agree about.
        problem: what is wrong on this rank; empty where nothing is.
        seed: () int64 of this rank.

    Returns:
        ``q_BLnH``, ``k_BLgH``, ``v_BLgH``, batch first, and the seed of the group's first rank.

    Raises:
        ValueError: the same text on every rank, if one has a problem or they disagree. On CUDA, and in compiled code,
            a device assertion on every rank instead: reading the words there would be a host sync in every layer.
    """
    device = call.q_BlNH.device
    expected = constant_digest(facts)
    word = BAD if problem else expected
    header = torch.stack([torch.tensor(word), seed]).to(device)
    tensors = call.stand_ins() if problem else call.tensors
    q_BlNH, k_BlGH, v_BlGH = tensors
    sent = [q_BlNH, call.heads.kv_by_rank(k_BlGH), call.heads.kv_by_rank(v_BlGH)]
    traded, headers = spread(sent, call.lanes, call.group, header.view(q_BlNH.dtype))
    header_P2 = headers.view(torch.int64)
    check_words(header_P2[:, 0], expected, facts, problem, call)
    if call.sharding.order == "LB":
        traded = [x.transpose(0, 1) for x in traded]
    q_BLnH, k_BLgH, v_BLgH = traded
    k_BLgH, v_BLgH = (call.heads.kv_for_queries(x, call.rank) for x in (k_BLgH, v_BLgH))
    return q_BLnH, k_BLgH, v_BLgH, header_P2[0, 1]


def check_words(word_P: Tensor, expected: int, facts: str, problem: str, call: Call) -> None:
    """Raise on every rank unless all sent the word that this rank expects."""
    if word_P.device.type != "cpu" or torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(
            (word_P == expected).all(), "sp_attention: the ranks disagree, or one has a problem"
        )
    elif set(word_P.tolist()) != {expected}:
        raise_on_every_rank(problem, facts, device=word_P.device, group=call.group)


@torch.compiler.assume_constant_result
def constant_digest(facts: str) -> int:
    """The digest, made while compiling: dynamo traces no hash of a text, and the facts are constants of the graph."""
    return digest(facts)
