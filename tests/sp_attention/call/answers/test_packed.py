"""Packed sequences: nothing crosses a document, and padding is nothing.

TransformerEngine #2596 (report 4) and the cases near it. Results are compared bit for bit with the same call on what
must not matter replaced: what padding holds, and what other documents hold.
"""

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool, RankThreads
from sp_attention import ulysses_attention
from sp_attention.reference import reference_attention
from tests.support.attention.packed import Sizes, Spans, attended, documents, tensors
from tests.support.attention.whole import Seen, recording
from tests.support.ranks import world
from tests.support.tensors import TOLERANCE, Order, difference, grad_of, leaf, same_bits, share

pytestmark = pytest.mark.usefixtures("uncovered")

# Documents (real length, slots), padding before the first, inside each, and a tail after the last: 28 tokens.
# One is all padding, one is empty, two have one token.
REALS, SLOTS, BEFORE, TAIL = [5, 0, 1, 7, 0, 1], [6, 2, 1, 9, 0, 3], 3, 4
CUTS = [(7, 7, 7, 7), (28, 0, 0, 0), (0, 3, 0, 25), (4, 5, 1, 18), (1, 9, 0, 18)]
FILLS = [float("nan"), float("inf"), -float("inf"), 1e30]


def spans_of(options: dict[str, Any]) -> Spans:
    """(start, end) of the real tokens of each document."""
    starts, lengths = options["cu_seqlens_padded"].tolist(), options["cu_seqlens"].diff().tolist()
    return [(start, start + length) for start, length in zip(starts, lengths, strict=False)]


def real_tokens(spans: Spans, length: int) -> Tensor:
    real_L = torch.zeros(length, dtype=torch.bool)
    for start, end in spans:
        real_L[start:end] = True
    return real_L


def wanted_of(rank: int, seq: Sizes, whole: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [leaf(x) for x in whole[:3]]
    out_BLNH = reference_attention(*leaves, **options)
    out_BLNH.backward(whole[3])
    return [share(x, seq, "BL", rank) for x in (out_BLNH.detach(), *map(grad_of, leaves))]


def filled(x_BLNH: Tensor, away_L: Tensor, value: float) -> Tensor:
    return x_BLNH.masked_fill(away_L[None, :, None, None], value)


NAMES = ("out", "dq", "dk", "dv")


def different(got: list[Tensor], wanted: list[Tensor]) -> list[str]:
    return [name for name, a, b in zip(NAMES, got, wanted, strict=True) if not same_bits(a, b)]


# ---- cases: what the ranks run -------------------------------------------------------------------------


def poisoned(rank: int, seq: Sizes, fill: float, dtype: torch.dtype) -> list[str]:
    """Report 4: with padding of q, k, v and of the gradient filled, nothing changes, and padding has exactly 0."""
    options = documents(REALS, SLOTS, BEFORE) | {"is_causal": True}
    clean = tensors(sum(seq), dtype=dtype)
    away_L = ~real_tokens(spans_of(options), sum(seq))
    wanted = attended(rank, seq, [filled(x, away_L, 0.0) for x in clean], **options)
    seen: list[Seen] = []
    attend = recording(seen)
    got = attended(rank, seq, [filled(x, away_L, fill) for x in clean], attend=attend, **options)
    away_Bl11 = share(away_L[None, :, None, None], seq, "BL", rank)
    failures = different(got, wanted)
    failures += [f"{name} at padding" for name, x in zip(NAMES, got, strict=True) if (x * away_Bl11).any()]
    failures += [f"{name} not finite" for name, x in zip(NAMES, got, strict=True) if not x.isfinite().all()]
    lengths = [call.shapes[0][1] for call in seen]
    return failures + [f"attended {lengths}"] * (lengths != [n for n in REALS if n])


def poisoned_keys(rank: int, fill: float, order: Order) -> list[str]:
    """What key_padding_mask closes may hold anything, in k and in v: a batch of two rows, causal too."""
    keep_BL = torch.tensor([[True, True, False, True, False], [False, True, True, False, False]])
    sharding = TokenSharding(batch=2, seq=Partition((2, 3)), order=order)
    draw = torch.Generator().manual_seed(2)
    q_BLNH, k_BLGH, v_BLGH = (torch.randn(2, 5, n, 4, generator=draw, dtype=torch.float64) for n in (4, 2, 2))
    answers = []
    for value in (0.0, fill):
        away_BL11 = ~keep_BL[:, :, None, None]
        parts = [q_BLNH, k_BLGH.masked_fill(away_BL11, value), v_BLGH.masked_fill(away_BL11, value)]
        leaves = [leaf(share(x, (2, 3), order, rank)) for x in parts]
        out_BlNH = ulysses_attention(
            *leaves, sharding=sharding, group=world(), key_padding_mask=keep_BL, is_causal=True
        )
        out_BlNH.sum().backward()
        answers.append([out_BlNH.detach(), *map(grad_of, leaves)])
    closed = share(~keep_BL[:, :, None, None], (2, 3), order, rank)
    padding = [name for name, x in zip(NAMES[2:], answers[1][2:], strict=True) if (x * closed).any()]
    return different(answers[1], answers[0]) + padding


def equal_to_reference(rank: int, seq: Sizes, options: dict[str, Any]) -> list[str]:
    whole = tensors(sum(seq))
    pairs = zip(NAMES, attended(rank, seq, whole, **options), wanted_of(rank, seq, whole, **options), strict=True)
    return [name for name, got, wanted in pairs if not difference(got, wanted) <= TOLERANCE]


def one_document_alone(rank: int, seq: Sizes, document: int) -> list[str]:
    """Invariant 4: all other tokens replaced, of documents and of padding, a document's bits stay."""
    options = documents(REALS, SLOTS, BEFORE)
    before, others = tensors(sum(seq)), tensors(sum(seq))
    mine_L = real_tokens(spans_of(options)[document : document + 1], sum(seq))
    for x_BLNH in others:
        x_BLNH[:, ~mine_L] = x_BLNH[:, ~mine_L].flip(0, 1, 2) * 3 + 1
    mine_l = share(mine_L[None], seq, "BL", rank)[0]
    results = [attended(rank, seq, whole, **options) for whole in (before, others)]
    return different(*([x[:, mine_l] for x in result] for result in results))


def lengths_from_step_to_step(rank: int) -> list[str]:
    """B25: shards whose length changes between steps on some ranks only, backward every other step."""
    failures = []
    for step, seq in enumerate(
        [(5, 4, 3), (5, 3, 4), (5, 7, 0), (5, 0, 7), (0, 0, 12), (5, 4, 3), (5, 4, 4), (5, 4, 0)]
    ):
        reals = [sum(seq) // 2, sum(seq) - sum(seq) // 2 - 1]
        options = documents(reals, [reals[0], reals[1] + 1]) | {"is_causal": step % 2 == 0}
        whole = tensors(sum(seq))
        if step % 3 == 2:
            mine = [share(x, seq, "BL", rank) for x in whole[:3]]
            sharding = TokenSharding(batch=1, seq=Partition(seq))
            got = [ulysses_attention(*mine, sharding=sharding, group=world(), **options)]
        else:
            got = attended(rank, seq, whole, **options)
        wanted = wanted_of(rank, seq, whole, **options)
        pairs = zip(NAMES, got, wanted, strict=False)
        failures += [f"{name} of step {step}" for name, a, b in pairs if not difference(a, b) <= TOLERANCE]
    return failures


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("seq", CUTS)
def test_report_4_padding_between_documents_may_hold_anything(
    rank_threads: RankThreads, seq: Sizes, fill: float, dtype: torch.dtype
) -> None:
    """Invariant 3. TransformerEngine #2596. The padding of the incoming gradient too, and the tail."""
    assert rank_threads.run(poisoned, 4, seq, fill, dtype) == [[]] * 4


@pytest.mark.parametrize("order", ["BL", "LB"])
@pytest.mark.parametrize("fill", FILLS)
def test_keys_that_are_masked_away_may_hold_anything(rank_threads: RankThreads, fill: float, order: Order) -> None:
    """Invariant 3."""
    assert rank_threads.run(poisoned_keys, 2, fill, order) == [[], []]


@pytest.mark.parametrize("seq", [(170, 176, 176, 182), (176,) * 4, (352, 0, 351, 1), (700, 2, 1, 1)])
def test_report_4_698_tokens_in_704_slots(rank_pool: RankPool, seq: Sizes) -> None:
    """B14: TransformerEngine #3331 counted 174 tokens on each of 4 ranks, and dropped the last real ones."""
    options: dict[str, Any] = documents([200, 1, 300, 197], [204, 1, 300, 199]) | {"is_causal": True}
    assert options["cu_seqlens"][-1] == 698
    assert options["cu_seqlens_padded"][-1] == 704
    assert rank_pool.run(equal_to_reference, 4, seq, options) == [[]] * 4


@pytest.mark.parametrize(("real", "slots"), [(7, 8), (7, 10), (5, 8)])
def test_one_padded_document_on_two_ranks(rank_threads: RankThreads, real: int, slots: int) -> None:
    """B14."""
    options = documents([real], [slots])
    assert rank_threads.run(equal_to_reference, 2, (slots // 2, slots // 2), options) == [[]] * 2


@pytest.mark.parametrize("seq", CUTS)
@pytest.mark.parametrize("document", [i for i, real in enumerate(REALS) if real])
def test_a_document_does_not_depend_on_the_others(rank_threads: RankThreads, seq: Sizes, document: int) -> None:
    """Invariant 4."""
    assert rank_threads.run(one_document_alone, 4, seq, document) == [[]] * 4


@pytest.mark.parametrize(
    "reals", [[12], [0, 12], [12, 0], [0, 0, 12, 0], [1] * 12, [1, 0, 11], [11, 0, 1], [6, 6], [5, 7]]
)
def test_documents_of_no_token_and_of_one(rank_threads: RankThreads, reals: list[int]) -> None:
    """Without padding, and with cu_seqlens alone."""
    options = {"cu_seqlens": torch.tensor([0, *accumulate(reals)]), "is_causal": True}
    assert rank_threads.run(equal_to_reference, 3, (5, 0, 7), options) == [[]] * 3


@pytest.mark.parametrize("reals", [[0], [0, 0], []])
def test_nothing_but_padding(rank_threads: RankThreads, reals: list[int]) -> None:
    """Zeros, which are part of the graph on every rank."""
    options = documents(reals, [0] * len(reals), 2)
    assert rank_threads.run(equal_to_reference, 2, (3, 4), options) == [[]] * 2


def test_lengths_that_change_from_step_to_step(rank_pool: RankPool) -> None:
    """Invariant 7, B25."""
    assert rank_pool.run(lengths_from_step_to_step, 3) == [[]] * 3
