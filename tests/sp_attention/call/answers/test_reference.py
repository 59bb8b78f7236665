"""ulysses_attention equals attention on one rank: outputs and every gradient, over lengths, heads and masks.

The whole of a case is the same on every rank. Ranks cut their share out of it by slicing, run the attention, and say
what differs from their share of the answer of sp_attention/reference.py. Cases are drawn once, and run in batches.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from moe_dispatch.testing import RankPool, RankThreads
from tests.support.attention.case import Case, named_case
from tests.support.attention.drawn import BATCH_OF_CASES, HEADS, WIDTHS, cases_of_every_size, cases_of_ranks
from tests.support.attention.equal import failures_of
from tests.support.attention.masks import KINDS
from tests.support.tensors import scattered

pytestmark = pytest.mark.usefixtures("uncovered")

# Public bug reports (B) that are one call, and reports of our own users.
NAMED = {
    "B4 two documents": named_case(2, "packed", (8, 8), batch=1, num_heads=(8, 4)),
    "B4 padding on the left": named_case(2, "left pad", (8, 8), num_heads=(8, 4)),
    "B4 sliding window": named_case(2, "window", (8, 8), num_heads=(8, 4)),
    "B9 uneven shards and a key mask": named_case(3, "holes", (3, 2, 2), num_heads=(6, 6)),
    "B9 uneven shards the other way": named_case(3, "right pad", (3, 3, 2), num_heads=(6, 6)),
    "B19 grouped heads, narrow values": named_case(2, "causal", (4, 4), num_heads=(4, 2), widths=(6, 4)),
    "B20 28 query and 7 key/value heads": named_case(2, "causal", (3, 4), num_heads=(28, 7)),
    "B24 window wider than a shard": named_case(4, "window", (4, 4, 4, 4), num_heads=(4, 4)),
    "B27 fewer heads than ranks": named_case(4, "causal", (2, 2, 2, 1), num_heads=(2, 1)),
    "B28 one head, four tokens": named_case(2, "none", (2, 2), num_heads=(1, 1), widths=(4, 4)),
    "report 2: three heads": named_case(2, "none", (4, 4), num_heads=(3, 3)),
    "report 2: 6 over 3": named_case(2, "causal", (4, 4), num_heads=(6, 3)),
    "report 2: 12 over 3": named_case(2, "causal", (4, 4), num_heads=(12, 3)),
    "report 2: one key/value head": named_case(4, "causal", (4, 4, 1, 2), num_heads=(8, 1)),
    "report 3: five tokens on two ranks": named_case(2, "causal", (3, 2), num_heads=(4, 2), widths=(6, 4)),
    "report 3: sequence-first": named_case(2, "none", (4, 4), num_heads=(4, 4), widths=(3, 3), order="LB"),
    "MLA widths": named_case(3, "causal", (3, 0, 4), num_heads=(5, 5), widths=(192, 128)),
    "MLA widths, one key/value head": named_case(3, "causal", (3, 0, 4), num_heads=(5, 1), widths=(192, 128)),
    "no token at all": named_case(2, "causal", (0, 0), num_heads=(4, 2)),
    "no key": named_case(2, "cross", (3, 2), num_heads=(4, 2), kv_seq=(0, 0)),
    "no query": named_case(2, "cross", (0, 0), num_heads=(4, 2), kv_seq=(3, 2)),
    "a row that sees nothing": named_case(2, "closed row", (3, 2), num_heads=(4, 2)),
    "queries before every key": named_case(2, "cross causal", (6, 3), num_heads=(4, 2), kv_seq=(1, 2)),
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equal_to_the_reference(rank_threads: RankThreads, ranks: int) -> None:
    """Invariants 2, in float64 and with a gradient of every input on every rank (B26), and 11: what ``attend`` was
    called with is what was given. Measured: 3.3e-15 at most."""
    assert failures_of(rank_threads, ranks, cases_of_ranks(ranks, BATCH_OF_CASES)) == []


@pytest.mark.parametrize("name", NAMED)
def test_a_case_that_others_got_wrong(rank_pool: RankPool, name: str) -> None:
    assert failures_of(rank_pool, NAMED[name].ranks, [NAMED[name]]) == []


def test_the_drawn_cases_reach_what_others_got_wrong() -> None:
    """Invariant 11: a grid without an empty shard, a rank without heads or a group over ranks proves little."""
    batch = [case for ranks in (3, 4) for case in cases_of_ranks(ranks, BATCH_OF_CASES)]
    wanted: dict[str, Callable[[Case], bool]] = {
        "an empty shard among others": lambda case: 0 in case.seq and max(case.seq) < sum(case.seq),
        "one rank has everything": lambda case: max(case.seq) == sum(case.seq) > 1,
        "uneven": lambda case: len(set(case.seq)) == case.ranks,
        "a rank without heads": lambda case: 0 in case.head_sizes,
        "fewer heads than ranks": lambda case: case.num_heads[0] < case.ranks,
        "a group that straddles ranks": lambda case: case.shares_a_kv_head,
        "whole groups": lambda case: not case.shares_a_kv_head and case.num_heads[1] > 1 and case.batch > 1,
        "batch-first, uneven, two rows": lambda case: (
            case.order == "BL" and case.batch > 1 and len(set(case.seq)) > 1
        ),
        "sequence-first, two rows": lambda case: case.order == "LB" and case.batch > 1,
        "67 tokens": lambda case: sum(case.seq) == 67,
    }
    wanted |= {f"heads {heads}": lambda case, heads=heads: case.num_heads == heads for heads in HEADS}
    wanted |= {f"widths {widths}": lambda case, widths=widths: case.widths == widths for widths in WIDTHS}
    wanted |= {kind: lambda case, kind=kind: case.kind == kind and sum(case.seq) > 1 for kind in KINDS}
    assert {name for name, reaches in wanted.items() if sum(map(reaches, batch)) < 2} == set()


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_length_and_head_count(rank_threads: RankThreads, ranks: int, kind: str) -> None:
    assert failures_of(rank_threads, ranks, cases_of_every_size(ranks, kind), timeout=600) == []


# ---- many ranks ----------------------------------------------------------------------------------------

UNEVEN = {ranks: tuple(rank % 3 for rank in range(ranks)) for ranks in (16, 64)}  # a third of the shards is empty
FEW = {ranks: scattered(5, ranks) for ranks in (16, 64)}
ALL_ON_ONE = (*(0,) * 14, 9, 0)
MANY = {
    "few tokens, few heads": named_case(16, "causal", FEW[16], num_heads=(4, 2)),
    "more heads than ranks": named_case(16, "holes", UNEVEN[16], num_heads=(18, 9), order="LB"),
    "groups over ranks": named_case(16, "float (BNLL)", FEW[16], num_heads=(32, 2)),
    "keys on other ranks": named_case(16, "cross sinks", ALL_ON_ONE, num_heads=(6, 3), kv_seq=FEW[16]),
    "ranks without heads": replace(named_case(16, "window", UNEVEN[16], num_heads=(5, 5)), heads=FEW[16]),
    "documents": named_case(16, "masked documents", UNEVEN[16], batch=1, num_heads=(3, 1)),
    "few tokens, few heads, 64 ranks": named_case(64, "causal", FEW[64], num_heads=(4, 2), order="LB"),
    "documents, 64 ranks": named_case(64, "masked documents", UNEVEN[64], batch=1, num_heads=(3, 1)),
}


@pytest.mark.parametrize("name", MANY)
def test_more_ranks_than_tokens_or_heads(rank_threads: RankThreads, name: str) -> None:
    assert failures_of(rank_threads, MANY[name].ranks, [MANY[name]]) == []
