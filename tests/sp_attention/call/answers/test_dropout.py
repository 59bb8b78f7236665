"""Dropout, whose pattern is the same for every number of ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool, RankThreads
from sp_attention import UlyssesAttention, ulysses_attention
from sp_attention.reference import reference_attention
from tests.support.attention.wrong_calls import right_call
from tests.support.ranks import world
from tests.support.tensors import TOLERANCE, difference, grad_of, leaf, share

BATCH, LENGTH, HEADS = 2, 12, 4


def kept_weights(rank: int, ranks_seq: tuple[int, ...], seed: int, p: float, **options: Any) -> Tensor:
    """(1 or B, l, N, L) which weights stay, and how they grow: scores are equal, and values unit vectors."""
    batch = 1 if "cu_seqlens" in options else BATCH
    length = sum(ranks_seq)
    zeros_BlNH = torch.zeros(batch, ranks_seq[rank], HEADS, 2, dtype=torch.float64)
    units_BLGH = torch.eye(length, dtype=torch.float64)[None, :, None].expand(batch, -1, HEADS, -1)
    torch.manual_seed(seed + 1000 * rank)  # only the first rank's seed counts
    module = UlyssesAttention(group=world(), dropout_p=p)
    out_BlNH = module(
        zeros_BlNH,
        zeros_BlNH,
        share(units_BLGH, ranks_seq, "BL", rank),
        sharding=TokenSharding(batch=batch, seq=Partition(ranks_seq)),
        **options,
    )
    return out_BlNH * length


def dropped_everywhere(rank: int, ranks_seq: tuple[int, ...], p: float) -> tuple[Tensor, Tensor]:
    """The pattern with documents and without."""
    cu_seqlens = torch.tensor([0, 5, 12])
    plain = kept_weights(rank, ranks_seq, 3, p)
    return plain, kept_weights(rank, ranks_seq, 3, p, cu_seqlens=cu_seqlens)


def dropped_gradients(rank: int, ranks_seq: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """out, dq, dk, dv, and the pattern that the same seed gives."""
    pattern_BlNL = kept_weights(rank, ranks_seq, 5, 0.4)
    parts = [leaf(share(x, ranks_seq, "BL", rank)) for x in dropout_tensors()[:3]]
    torch.manual_seed(5 + 1000 * rank)
    sharding = TokenSharding(batch=BATCH, seq=Partition(ranks_seq))
    out_BlNH = ulysses_attention(*parts, sharding=sharding, group=world(), dropout_p=0.4, is_causal=True)
    out_BlNH.backward(share(dropout_tensors()[3], ranks_seq, "BL", rank))
    return [out_BlNH.detach(), *map(grad_of, parts)], pattern_BlNL


def dropout_tensors() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = ((HEADS, 6), (2, 6), (2, 4), (HEADS, 4))
    return [torch.randn(BATCH, LENGTH, *shape, generator=draw, dtype=torch.float64) for shape in shapes]


def patterns_of_calls(rank: int) -> tuple[bool, bool, bool]:
    """Is the next call's pattern another, the same seed's the same, and is there none in eval mode?"""
    seq = (5, 7)
    first, again, other = (kept_weights(rank, seq, seed, 0.5) for seed in (1, 1, 2))
    arguments = right_call(rank)
    torch.manual_seed(1)
    module = UlyssesAttention(group=world(), dropout_p=0.9).eval()
    q, k, v = (arguments.pop(name) for name in ("q_BlNH", "k_BlGH", "v_BlGH"))
    evaluated_BlNH = module(q, k, v, sharding=arguments["sharding"])
    plain_BlNH = ulysses_attention(q, k, v, sharding=arguments["sharding"], group=world())
    return torch.equal(first, other), torch.equal(first, again), torch.equal(evaluated_BlNH, plain_BlNH)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_the_same_for_any_number_of_ranks(rank_threads: RankThreads, p: float) -> None:
    whole: list[list[Tensor]] = []
    for seq in [(12,), (5, 7), (4, 0, 8), (1, 5, 2, 4)]:
        results = rank_threads.run(dropped_everywhere, len(seq), seq, p)
        whole.append([torch.cat(parts, dim=1) for parts in zip(*results, strict=True)])
    for plain, packed in whole[1:]:
        assert torch.equal(plain, whole[0][0])
        assert torch.equal(packed, whole[0][1])
    plain_BLNL, packed_BLNL = whole[0]
    share_kept = (plain_BLNL > 0).double().mean().item()
    assert abs(share_kept - (1 - p)) < 4 * (p * (1 - p) / plain_BLNL.numel()) ** 0.5  # 4 standard deviations
    assert (
        difference(plain_BLNL[plain_BLNL > 0], torch.full_like(plain_BLNL[plain_BLNL > 0], 1 / (1 - p))) < TOLERANCE
    )
    for start, end in ((0, 5), (5, 12)):  # a document keeps what the whole sequence keeps there
        assert torch.equal(packed_BLNL[0, start:end, :, start:end] > 0, plain_BLNL[0, start:end, :, start:end] > 0)
    rows = [row for head_LL in plain_BLNL.transpose(1, 2).flatten(0, 1) > 0 for row in head_LL.tolist()]
    assert len({tuple(row) for row in rows}) > 0.4 * len(rows)  # rows, heads and queries have patterns of their own


@pytest.mark.parametrize("seq", [(12,), (5, 7), (4, 0, 8)])
def test_gradients_through_dropout(rank_threads: RankThreads, seq: tuple[int, ...]) -> None:
    results = rank_threads.run(dropped_gradients, len(seq), seq)
    got = [torch.cat(parts, dim=1) for parts in zip(*(tensors for tensors, _ in results), strict=True)]
    keep_BNLL = torch.cat([pattern for _, pattern in results], dim=1).transpose(1, 2) > 0
    leaves = [leaf(x) for x in dropout_tensors()[:3]]
    out_BLNH = reference_attention(*leaves, is_causal=True, keep_BNLL=keep_BNLL, dropout_p=0.4)
    out_BLNH.backward(dropout_tensors()[3])
    wanted = [out_BLNH.detach(), *map(grad_of, leaves)]
    assert [difference(a, b) <= TOLERANCE for a, b in zip(got, wanted, strict=True)] == [True] * 4


def test_each_call_drops_other_weights_and_eval_none(rank_pool: RankPool) -> None:
    assert rank_pool.run(patterns_of_calls, 2) == [(False, True, True)] * 2
