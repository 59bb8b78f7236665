"""Which scheme is chosen, by numbers that can be worked out by hand; what cannot be."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_dispatch import Partition, TokenSharding
from sp_attention import Machine, Scheme, SchemeChoice, balance, choose_scheme
from sp_attention.choice.cost import cost_of
from tests.support.attention.drawn import cases, drawn
from tests.support.planned import sizes, work
from tests.support.schemes import sampled

pytestmark = pytest.mark.usefixtures("uncovered")

MACHINE = Machine(ranks_per_node=2, intra_gb_s=100, inter_gb_s=10, latency_us=10, tflop_s=100)
EVEN = TokenSharding(batch=1, seq=Partition.balanced(64, 4))
LONG = TokenSharding(batch=1, seq=Partition.balanced(4096, 4))
CALL: dict[str, Any] = {"num_heads": (8, 2), "widths": (16, 16), "dtype": torch.bfloat16, "machine": MACHINE}


def choose(sharding: TokenSharding, **changes: Any) -> SchemeChoice:
    given: dict[str, Any] = CALL | changes
    return choose_scheme(sharding, **given)


def test_ulysses_by_hand() -> None:
    """64 tokens over 4 ranks, 16 each; 2 of 8 query heads of 16 each, and a key/value head each, twice held."""
    (cost,) = (each for each in choose(EVEN, is_causal=True).costs if each.scheme == Scheme.ulysses())
    to_other = 16 * (2 * 16 + 2 * 16) * 2 + 16 * 2  # rows x (query heads + k and v) x bytes, and a header
    home = 16 * 2 * 16 * 2 + 8 * 2
    assert cost.forward_bytes == 12 * (16 + to_other + home)
    assert cost.backward_bytes == 12 * (to_other - 32 + home - 16)
    assert cost.intra_bytes == (cost.forward_bytes + cost.backward_bytes) // 12  # of one link, 1 of 3 ranks
    assert cost.inter_bytes == 2 * cost.intra_bytes
    assert (cost.collectives, cost.balance) == (5, 1.0)
    kept = 64 * (2 * 16 + 2 * 16 + 2 * 16) * 2
    assert (cost.kept_bytes, cost.most_bytes) == (kept, kept)
    assert cost.link_ms == pytest.approx(1e3 * cost.inter_bytes / 10e9 + 5 * 0.01, rel=1e-12)
    pairs = 2 * 64 * 65 // 2  # of 2 heads
    assert cost.work_ms == pytest.approx(1e3 * pairs * 2 * (4 + 3) * 16 / 100e12, rel=1e-12)
    assert cost.milliseconds == cost.link_ms + cost.work_ms


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_bytes_and_collectives_are_those_of_the_traffic(ranks: int) -> None:
    for each in sampled(drawn(cases(ranks, "causal"), 12, f"cost {ranks}")):
        cost = cost_of(work(each, at_once=False), sizes(each, 8), replace(MACHINE, ranks_per_node=ranks))
        assert cost.inter_bytes == 0
        assert cost.intra_bytes * ranks >= cost.forward_bytes + cost.backward_bytes
        assert cost.balance >= 1 - 1e-12


def test_teams_inside_of_a_node_take_less_of_the_slower_links() -> None:
    """Gathered keys would cross between nodes once to each rank of a node, and not once to its team."""
    choice = choose(LONG, is_causal=True, machine=replace(MACHINE, tflop_s=math.inf))
    assert choice.best == Scheme.two_dimensional(head_ranks=2, keep=True)
    gather = next(each for each in choice.costs if each.scheme == Scheme.gather(keep=True))
    assert gather.forward_bytes < choice.costs[0].forward_bytes
    assert gather.inter_bytes > choice.costs[0].inter_bytes


def test_slow_links_choose_less_bytes_and_slow_ranks_even_work() -> None:
    """4 contiguous causal shards: gathered keys are fewest bytes, and 1.75 times the work."""
    links, slow = (replace(MACHINE, ranks_per_node=1, tflop_s=tflop_s) for tflop_s in (math.inf, 1e-3))
    assert choose(LONG, is_causal=True, machine=links).best == Scheme.gather(keep=True)
    choice = choose(LONG, is_causal=True, machine=slow)
    assert choice.best == Scheme.ulysses()
    gather = next(each for each in choice.costs if each.scheme == Scheme.gather())
    assert gather.balance == pytest.approx(1.75, abs=1e-3)


def test_another_order_is_told() -> None:
    choice = choose(EVEN, is_causal=True, machine=replace(MACHINE, tflop_s=1e-3))
    assert set(choice.orders) == {"zigzag"}
    assert choice.orders["zigzag"].balance == 1.0
    zigzag = TokenSharding.zigzag(batch=1, length=64, ranks=4)
    assert set(choose(zigzag).orders) == {"contiguous"}


def test_documents_say_which_rows_travel_and_which_order_is_even() -> None:
    cu_seqlens = torch.tensor([0, 40, 44, 64])
    choice = choose(EVEN, is_causal=True, cu_seqlens=cu_seqlens)
    whole = choose(EVEN, is_causal=True)
    sent = [next(x for x in each.costs if x.scheme == Scheme.gather()).forward_bytes for each in (choice, whole)]
    # Keys of 32 bf16 values, 2 heads: 16 + 32 of the first document, 8 + 0 ... of the others; else 16 + 32 + 48.
    row = 2 * 32 * 2
    assert sent == [12 * 16 + row * (16 + 32 + 4), 12 * 16 + row * (16 + 32 + 48)]
    assert set(choice.orders) == {"zigzag", "balance"}
    even = balance(cu_seqlens, 4, length=64)
    in_it = choose(even, is_causal=True, cu_seqlens=cu_seqlens).costs[0]
    assert choice.orders["balance"] == in_it


def test_what_does_not_fit_is_last_and_told() -> None:
    free = choose(LONG)
    least = min(free.costs, key=lambda each: each.most_bytes)
    assert least != free.costs[0]
    tight = choose(LONG, limit_bytes=least.most_bytes)
    assert tight.best == least.scheme
    assert f"of {len(free.costs)} schemes need more than" in tight.why
    with pytest.raises(
        ValueError, match=r"limit_bytes is 10, but the least of all schemes, gather, kept, needs .*: chunk=8"
    ):
        choose(EVEN, limit_bytes=10)


def test_an_attend_of_the_callers_takes_no_ring() -> None:
    costs = choose(EVEN, own_attend=True).costs
    assert {each.scheme.keys.value for each in costs} == {"gather"}
    assert all(each.scheme.keep for each in costs)


def test_a_chunk_is_in_all_schemes() -> None:
    costs = choose(EVEN, chunk=4).costs
    assert {each.scheme.chunk for each in costs} == {4}
    assert min(each.collectives for each in costs) > 5


def test_one_rank_has_one_scheme_and_sends_nothing() -> None:
    (cost,) = choose(TokenSharding(batch=2, seq=Partition((9,)))).costs
    assert (cost.forward_bytes, cost.backward_bytes, cost.collectives, cost.link_ms) == (0, 0, 0, 0)


def test_the_table_and_why() -> None:
    text = str(choose(EVEN, is_causal=True))
    assert text.splitlines()[0].split()[:3] == ["scheme", "ms", "MB"]
    assert sum("head ranks" in line.split(" is cheapest")[0] for line in text.splitlines()[:-1]) >= 3
    assert "is cheapest:" in text.splitlines()[-1]
    assert "; next is " in text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_heads": (8, 3)}, "8 query heads over 3 key/value heads"),
        ({"num_heads": (0, 0)}, "num_heads is 0"),
        ({"widths": (16, 0)}, "widths is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"chunk": 4, "own_attend": True}, "own_attend with chunk 4"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "documents end at 9"),
        ({"kv_sharding": TokenSharding(batch=1, seq=Partition((9, 9)))}, "as many ranks for both"),
    ],
)
def test_what_cannot_be(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        choose(EVEN, **change)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ranks_per_node": 0}, "ranks_per_node is 0"),
        ({"intra_gb_s": 0}, "intra_gb_s is 0; it has to be a number above 0"),
        ({"tflop_s": math.nan}, "tflop_s is nan"),
        ({"latency_us": -1}, "latency_us is -1; it has to be a number above 0, or 0"),
        ({"inter_gb_s": "fast"}, "inter_gb_s is 'fast'"),
    ],
)
def test_a_machine_that_cannot_be(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(MACHINE, **change)
