"""attention_over_ranks equals attention on one rank in every scheme and every order of tokens: outputs and every
gradient, over lengths, heads, widths and masks."""

from collections.abc import Callable

import pytest

from moe_dispatch.testing import RankThreads
from sp_attention import Scheme, blockwise_attend, flex_attend, scaled_dot_product
from tests.support.attention.case import Attend, Case, named_case
from tests.support.attention.drawn import HEADS, cases, cases_of_every_size, drawn
from tests.support.attention.masks import KINDS, PACKED
from tests.support.schemes import (
    ORDERS,
    SpreadCase,
    differences,
    failures_in,
    sampled,
    schemes,
    takes_attend,
)
from tests.support.tensors import TOLERANCE, scattered

pytestmark = pytest.mark.usefixtures("uncovered")


def spread_cases(ranks: int) -> list[SpreadCase]:
    return list(
        sampled(
            [case for kind in KINDS for case in drawn(cases(ranks, kind), 1 + (ranks > 2), f"scheme {ranks} {kind}")]
        )
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equal_to_the_reference(rank_threads: RankThreads, ranks: int) -> None:
    """Measured: 5e-15 at most."""
    assert failures_in(rank_threads, ranks, spread_cases(ranks)) == []


def test_the_cases_reach_every_scheme_order_and_kind() -> None:
    batch = [each for ranks in (3, 4) for each in spread_cases(ranks)]
    wanted: dict[str, Callable[[SpreadCase], bool]] = {
        "an empty shard": lambda each: 0 in each.shardings[0].local_sizes and sum(each.case.seq) > 1,
        "fewer heads than ranks of a team": lambda each: (
            each.case.num_heads[0] < each.scheme.team_size(each.case.ranks)
        ),
        "heads cut anywhere": lambda each: each.heads is not None and len(each.heads) > 1,
        "sequence first, two rows": lambda each: each.case.order == "LB" and each.case.batch > 1,
    }
    wanted |= {f"{scheme}": lambda each, scheme=scheme: each.scheme == scheme for scheme in schemes(4)}
    wanted |= {order: lambda each, order=order: each.tokens == order for order in ORDERS}
    wanted |= {f"heads {heads}": lambda each, heads=heads: each.case.num_heads == heads for heads in HEADS}
    assert {name for name, reaches in wanted.items() if sum(map(reaches, batch)) < 2} == set()


MANY = {
    "causal": named_case(16, "causal", scattered(23, 16), num_heads=(4, 2)),
    "window": named_case(8, "window", (*(0,) * 6, 19, 0), num_heads=(3, 3), order="LB"),
    "documents": named_case(16, "masked documents", tuple(rank % 3 for rank in range(16)), batch=1, num_heads=(6, 3)),
    "cross": named_case(8, "cross causal", scattered(9, 8), num_heads=(8, 2), kv_seq=scattered(13, 8)),
}


@pytest.mark.parametrize("tokens", ["contiguous", "any"])
@pytest.mark.parametrize("name", MANY)
def test_many_ranks(rank_threads: RankThreads, name: str, tokens: str) -> None:
    case = MANY[name]
    some = [
        Scheme.gather(),
        Scheme.ring(chunk=2),
        Scheme.two_dimensional(head_ranks=4),
        Scheme.two_dimensional(head_ranks=2, keys="ring"),
    ]
    assert failures_in(rank_threads, case.ranks, [SpreadCase(case, scheme, tokens) for scheme in some]) == []


def every_size(ranks: int, kind: str) -> list[SpreadCase]:
    choices = schemes(ranks)
    first = sum(map(ord, kind))  # so that a size meets other schemes with other masks
    return [
        SpreadCase(case, choices[(first + i) % len(choices)], ORDERS[(first // 7 + i) % len(ORDERS)])
        for i, case in enumerate(cases_of_every_size(ranks, kind))
    ]


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_length_and_head_count(rank_threads: RankThreads, ranks: int, kind: str) -> None:
    assert failures_in(rank_threads, ranks, every_size(ranks, kind), timeout=600) == []


# ---- an attend of the caller's --------------------------------------------------------------------------

NO_FLEX = {"sinks", "sinks and mask", "masked documents", "cross sinks"}


def of_attend(rank: int, batch: list[SpreadCase], attend: Attend) -> list[str]:
    return [
        f"{name} by {by:.1e}: {each}"
        for each in batch
        for name, by in differences(rank, each, attend).items()
        if not by <= TOLERANCE
    ]


def with_all_keys(ranks: int, kinds: list[str]) -> list[SpreadCase]:
    some = [scheme for scheme in schemes(ranks) if takes_attend(scheme)]
    found: list[Case] = [case for kind in kinds for case in drawn(cases(ranks, kind), 1, f"attend {ranks} {kind}")]
    return [
        SpreadCase(case, some[i % len(some)], ORDERS[(i // len(some) + i) % len(ORDERS)])
        for i, case in enumerate(found)
    ]


@pytest.mark.parametrize("ranks", [2, 4])
def test_an_attend_of_the_callers(rank_threads: RankThreads, ranks: int) -> None:
    """It is told causal, window and places for the part that it gets."""
    batch = with_all_keys(ranks, list(KINDS))
    results = rank_threads.run(of_attend, ranks, batch, scaled_dot_product, timeout=60)
    assert [failure for failures in results for failure in failures] == []


def test_an_attend_is_told_windows_from_its_last_key(rank_threads: RankThreads) -> None:
    """Keys after the last query's own move both sides of a window."""
    case = named_case(3, "cross window", (7, 6, 8), num_heads=(4, 2), kv_seq=(8, 2, 9))
    both_sides = [
        SpreadCase(case, scheme, tokens) for scheme in schemes(3) for tokens in ORDERS if takes_attend(scheme)
    ]
    results = rank_threads.run(of_attend, 3, both_sides, scaled_dot_product, timeout=60)
    assert [failure for failures in results for failure in failures] == []


@pytest.mark.parametrize("attend", [blockwise_attend(chunk=4), flex_attend()], ids=["blockwise", "flex"])
def test_our_other_attends(rank_threads: RankThreads, attend: Attend) -> None:
    batch = with_all_keys(4, sorted({*PACKED, "causal", "window", "cross window", "holes"} - NO_FLEX))
    results = rank_threads.run(of_attend, 4, batch, attend, timeout=60)
    assert [failure for failures in results for failure in failures] == []
