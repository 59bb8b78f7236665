"""Where no two ranks share a key/value head, the bits are those of one process."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from moe_dispatch.testing import RankThreads
from sp_attention import scaled_dot_product
from tests.support.attention.case import Case, named_case
from tests.support.attention.drawn import BATCH_OF_CASES, cases_of_every_size, cases_of_ranks
from tests.support.attention.masks import KINDS
from tests.support.attention.one_process import whole_in_one_process
from tests.support.attention.whole import Whole, shares_of, shares_of_ulysses, whole_answer
from tests.support.tensors import same_bits

pytestmark = pytest.mark.usefixtures("uncovered")


@lru_cache(maxsize=8)  # ranks that are threads are at the same case, or one apart
def answer_of(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return whole_answer(whole_in_one_process(scaled_dot_product), Whole.of(case, dtype))


# ---- cases: what the ranks run -------------------------------------------------------------------------


def equal_in_bits(rank: int, batch: list[Case], dtype: torch.dtype) -> list[str]:
    """What differs, with ``attend`` left out, from the default one on whole tensors."""
    failures = []
    for case in batch:
        whole = Whole.of(case, dtype)
        wanted = shares_of(answer_of(case, dtype), rank, case)
        got = shares_of_ulysses(rank, case, whole)
        names = [name for name in ("out", "dq", "dk", "dv") if not same_bits(got[name], wanted[name])]
        failures += [f"{', '.join(names)}: {case}"] * bool(names)
    return failures


# ---- what the tests ask --------------------------------------------------------------------------------


def in_bits(
    threads: RankThreads, ranks: int, batch: list[Case], dtype: torch.dtype, timeout: float = 60
) -> list[str]:
    results = threads.run(equal_in_bits, ranks, batch, dtype, timeout=timeout)
    return [f"rank {rank}: {failure}" for rank, failures in enumerate(results) for failure in failures]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bit_equal_to_one_process(rank_threads: RankThreads, ranks: int, dtype: torch.dtype) -> None:
    """Invariant 2, where no two ranks share a key/value head, so that nothing is added up in another order: at small,
    odd widths, and at one that models have."""
    batch = [case for case in cases_of_ranks(ranks, BATCH_OF_CASES) if not case.shares_a_kv_head][::2]
    batch += [replace(case, widths=(64, 32)) for case in batch[::8]]
    assert len({case.kind for case in batch}) > 0.9 * len(KINDS)
    assert in_bits(rank_threads, ranks, batch, dtype) == []


@pytest.mark.parametrize("kind", ["cross", "cross bool", "cross float", "cross sinks"])
def test_bit_equal_where_one_head_meets_one_key(rank_threads: RankThreads, kind: str) -> None:
    """A product with one column takes another kernel for one head than for several."""
    batch = [
        named_case(2, kind, seq, batch=1, num_heads=(3, 3), widths=widths, kv_seq=(1, 0))
        for seq in ((34, 33), (9, 7))
        for widths in ((6, 6), (64, 64))
    ]
    batch += [replace(case, seed=0) for case in batch]  # a learned mask shows it with some values only
    assert in_bits(rank_threads, 2, batch, torch.float32) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_equal_where_sequences_are_attended_to_in_tiles(rank_threads: RankThreads, dtype: torch.dtype) -> None:
    """From 512 x 512 on. Ranks have 3, 0 and 3 heads, or 2 each; one has no tokens."""
    kv_seq = {"cross causal": (300, 20, 250)}
    batch = [
        named_case(3, kind, (300, 0, 241), batch=1, num_heads=(6, 6), widths=widths, kv_seq=kv_seq.get(kind))
        for kind in ("causal window", "right pad", "sinks", "cross causal")
        for widths in ((6, 4), (64, 64))
    ]
    batch += [replace(case, heads=(3, 0, 3)) for case in batch[::2]]
    assert in_bits(rank_threads, 3, batch, dtype) == []


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_bit_equal_for_every_length_and_head_count(rank_threads: RankThreads, ranks: int, kind: str) -> None:
    batch = [case for case in cases_of_every_size(ranks, kind) if not case.shares_a_kv_head]
    for dtype in (torch.float32, torch.bfloat16):
        assert in_bits(rank_threads, ranks, batch, dtype, timeout=600) == []
