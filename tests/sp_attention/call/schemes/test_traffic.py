"""What the plan counts is what is sent, to the byte: every collective of forward and backward, from each rank to each
other, in every scheme and order."""

import pytest
import torch

from moe_dispatch.testing import RankThreads
from sp_attention import Scheme
from sp_attention.work.traffic import Traffic, traffic_of
from tests.support.attention.case import named_case
from tests.support.attention.drawn import cases, drawn
from tests.support.planned import sent, sizes, work
from tests.support.schemes import SpreadCase, sampled, schemes, takes_attend

pytestmark = pytest.mark.usefixtures("uncovered")

KINDS = ("none", "causal", "window", "causal window", "packed", "padded", "with tail", "cross causal", "cross window")


def sampled_cases(ranks: int) -> list[SpreadCase]:
    """Two rounds of all schemes."""
    number = -(-2 * len(schemes(ranks)) // len(KINDS))
    return list(
        sampled([case for kind in KINDS for case in drawn(cases(ranks, kind), number, f"sent {ranks} {kind}")])
    )


def without_zeros(traffic: Traffic) -> Traffic:
    kept = [
        tuple({pair: number for pair, number in each.items() if number} for each in way)
        for way in (traffic.forward, traffic.backward)
    ]
    return Traffic(ranks=traffic.ranks, forward=kept[0], backward=kept[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_is_sent_is_what_the_plan_counts(rank_threads: RankThreads, ranks: int, dtype: torch.dtype) -> None:
    some = sampled_cases(ranks)
    assert {str(each.scheme) for each in some} == {str(scheme) for scheme in schemes(ranks)}
    for each in some[dtype == torch.bfloat16 :: 2]:
        planned = traffic_of(work(each, at_once=False), sizes(each, dtype.itemsize))
        assert sent(rank_threads, each, dtype, at_once=False) == without_zeros(planned), each


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_with_an_attend_of_the_callers(rank_threads: RankThreads, ranks: int) -> None:
    for each in sampled_cases(ranks):
        if takes_attend(each.scheme):
            planned = traffic_of(work(each, at_once=True), sizes(each, 8))
            assert sent(rank_threads, each, torch.float64, at_once=True) == without_zeros(planned), each


def remote_rows(ranks_of: RankThreads, kind: str, scheme: Scheme, seq: tuple[int, ...]) -> int:
    """Keys that cross, each to as many ranks as need it: by the bytes that really do."""
    case = named_case(len(seq), kind, seq, batch=1, num_heads=(2, 1), widths=(3, 2))
    traffic = sent(ranks_of, SpreadCase(case, scheme, "contiguous"), torch.float64, at_once=False)
    return sum(sum(each.values()) for each in traffic.forward[1:]) // (8 * (3 + 2))


@pytest.mark.parametrize("scheme", [Scheme.gather(), Scheme.ring()], ids=str)
def test_causal_sends_half_and_a_window_the_window(rank_threads: RankThreads, scheme: Scheme) -> None:
    seq = (6, 6, 6, 6)
    assert remote_rows(rank_threads, "none", scheme, seq) == 3 * 24
    assert remote_rows(rank_threads, "causal", scheme, seq) == 3 * 24 // 2
    assert remote_rows(rank_threads, "window", scheme, seq) == 3 * 4  # each but the first sees 4 keys before its own
