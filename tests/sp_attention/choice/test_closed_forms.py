"""The formulas of docs/planning.md are the exact plan where they apply, and say how many head ranks send least.

N query heads, G key/value heads, P ranks in teams of U, R = P / U teams; f is how many teams need a key, in the mean.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch

from moe_dispatch import Partition, TokenSharding
from sp_attention import Machine, Scheme, SchemeCost, choose_scheme
from sp_attention.work.traffic import HEADER_NUMBERS, WORD_BYTES

LENGTH, BATCH, WIDTHS = 512, 3, (6, 4)
LINKS = Machine(ranks_per_node=1, intra_gb_s=1, inter_gb_s=1, latency_us=0, tflop_s=math.inf)
WINDOW = 5


def contiguous(ranks: int) -> TokenSharding:
    return TokenSharding(batch=BATCH, seq=Partition.balanced(LENGTH, ranks))


def zigzag(ranks: int) -> TokenSharding:
    return TokenSharding.zigzag(batch=BATCH, length=LENGTH, ranks=ranks)


# The order, the mask, f by R, and below how many ranks gathered keys are less than U = G.
Form = tuple[
    Callable[[int], TokenSharding], dict[str, object], Callable[[int], Fraction], Callable[[int, int], Fraction]
]
FORMS: dict[str, Form] = {
    "full": (contiguous, {}, lambda teams: Fraction(teams), lambda n, g: Fraction(n, g) + 1),
    "causal": (
        contiguous,
        {"is_causal": True},
        lambda teams: Fraction(teams + 1, 2),
        lambda n, g: Fraction(2 * (n + g), g),
    ),
    "zigzag": (
        zigzag,
        {"is_causal": True},
        lambda teams: Fraction(3 * teams + 1, 4),
        lambda n, g: Fraction(4 * (n + g), 3 * g),
    ),
    "window": (
        contiguous,
        {"window": (WINDOW, 0)},
        lambda teams: 1 + Fraction(WINDOW * (teams - 1), LENGTH),
        lambda n, g: Fraction(10**9),
    ),
}


def costs(name: str, ranks: int, num_heads: tuple[int, int]) -> list[SchemeCost]:
    order, mask, *_ = FORMS[name]
    choice = choose_scheme(
        order(ranks),
        num_heads=num_heads,
        widths=WIDTHS,
        dtype=torch.float32,
        machine=LINKS,
        **mask,  # type: ignore[arg-type]
    )
    return list(choice.costs)


def bracket(name: str, ranks: int, num_heads: tuple[int, int], team: int) -> Fraction:
    """N (1 - 1 / U) + K (f - 1 / U), K = max(G, U)."""
    n, g = num_heads
    return n * (1 - Fraction(1, team)) + max(g, team) * (FORMS[name][2](ranks // team) - Fraction(1, team))


@pytest.mark.parametrize("num_heads", [(16, 4), (16, 16), (16, 1)])
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("name", FORMS)
def test_the_plan_is_the_formula(name: str, ranks: int, num_heads: tuple[int, int]) -> None:
    pairs, unit, (h, hv) = ranks * (ranks - 1), BATCH * LENGTH * 4, WIDTHS
    for each in costs(name, ranks, num_heads):
        team = each.scheme.team_size(ranks)
        headers = 4 * sum(HEADER_NUMBERS) * (team == ranks)
        forward = unit * (h + hv) * bracket(name, ranks, num_heads, team)
        assert each.forward_bytes == forward + pairs * (WORD_BYTES + headers)
        queries = num_heads[0] * (1 - Fraction(1, team))
        keys = max(num_heads[1], team) * (FORMS[name][2](ranks // team) - Fraction(1, team))
        again = unit * (queries * (2 * h + hv) + 2 * keys * (h + hv))
        assert each.backward_bytes == (forward if each.scheme.keep else again)


@pytest.mark.parametrize("num_heads", [(16, 4), (16, 16), (16, 1), (64, 8)])
@pytest.mark.parametrize("name", FORMS)
def test_least_is_sent_by_gathered_keys_or_as_many_head_ranks_as_key_heads(
    name: str, num_heads: tuple[int, int]
) -> None:
    for ranks in (2, 4, 8, 16):  # beyond the number of query heads, head ranks have nothing to do
        least = min(costs(name, ranks, num_heads), key=lambda each: each.backward_bytes)
        ends = {1, min(num_heads[1], ranks)}
        at = FORMS[name][3](*num_heads)
        if ranks < at:
            assert least.scheme == Scheme.gather(keep=True), ranks
        if ranks > at:
            assert least.scheme.team_size(ranks) in ends - ({1} if max(ends) > 1 else set()), ranks


def test_the_table_of_the_docs() -> None:
    """N 64, G 8, zigzag, in units of the bracket."""
    found = {
        (ranks, team): bracket("zigzag", ranks, (64, 8), team)
        for ranks, team in [(4, 1), (4, 4), (8, 1), (8, 8), (16, 1), (16, 16), (64, 1), (64, 64), (64, 8)]
    }
    assert list(found.values()) == [18, 54, 42, 63, 90, 75, 378, 126, 105]
