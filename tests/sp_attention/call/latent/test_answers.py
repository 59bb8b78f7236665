"""Attention whose keys and values are made of latents equals that of one rank which makes them first: outputs and
every gradient, in every scheme, every order of tokens, and with every option."""

import pytest

from moe_dispatch.testing import RankThreads
from sp_attention import Scheme, blockwise_attend, scaled_dot_product
from tests.support.attention.case import Attend, Case, named_case
from tests.support.attention.drawn import cases, drawn
from tests.support.attention.masks import KINDS
from tests.support.latent import differences
from tests.support.schemes import ORDERS, SpreadCase, sampled, schemes, takes_attend
from tests.support.tensors import TOLERANCE, scattered

pytestmark = pytest.mark.usefixtures("uncovered")

FORMS = {kind for kind in KINDS if "(" in kind}  # of masks: what they broadcast is the same as without latents
SOME_KINDS = [kind for kind in KINDS if kind not in FORMS or kind.endswith("(BNLL)")]


def failures_of(rank: int, batch: list[SpreadCase], attend: Attend | None) -> list[str]:
    return [
        f"rank {rank}: {name} by {by:.1e}: {each}"
        for each in batch
        for name, by in differences(rank, each, attend).items()
        if not by <= TOLERANCE
    ]


def all_failures(ranks_of: RankThreads, ranks: int, batch: list[SpreadCase], attend: Attend | None) -> list[str]:
    results = ranks_of.run(failures_of, ranks, batch, attend, timeout=60)
    return [failure for failures in results for failure in failures]


def of_kinds(ranks: int) -> list[Case]:
    return [case for kind in SOME_KINDS for case in drawn(cases(ranks, kind), 1, f"latent {ranks} {kind}")]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equal_to_the_reference(rank_threads: RankThreads, ranks: int) -> None:
    assert all_failures(rank_threads, ranks, list(sampled(of_kinds(ranks))), None) == []


MANY = {
    "causal": named_case(8, "causal", scattered(23, 8), num_heads=(4, 2)),
    "window": named_case(8, "window", (*(0,) * 6, 19, 0), num_heads=(3, 3), order="LB"),
    "documents": named_case(8, "masked documents", tuple(rank % 3 for rank in range(8)), batch=1, num_heads=(6, 3)),
}


@pytest.mark.parametrize("name", MANY)
def test_many_ranks(rank_threads: RankThreads, name: str) -> None:
    some = [Scheme.ulysses(), Scheme.ring(chunk=2), Scheme.two_dimensional(head_ranks=4, keys="ring")]
    batch = [SpreadCase(MANY[name], scheme, "any") for scheme in some]
    assert all_failures(rank_threads, 8, batch, None) == []


@pytest.mark.parametrize("attend", [scaled_dot_product, blockwise_attend(chunk=4)], ids=["default", "blockwise"])
def test_an_attend_of_the_callers(rank_threads: RankThreads, attend: Attend) -> None:
    """It gets whole keys, in Ulysses too, and they are in the graph."""
    some = [scheme for scheme in schemes(4) if takes_attend(scheme)]
    batch = [SpreadCase(case, some[i % len(some)], ORDERS[i % len(ORDERS)]) for i, case in enumerate(of_kinds(4))]
    assert all_failures(rank_threads, 4, batch, attend) == []


@pytest.mark.sweep
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_scheme_and_order(rank_threads: RankThreads, ranks: int) -> None:
    pairs = [(scheme, tokens) for scheme in schemes(ranks) for tokens in ORDERS]
    batch = [SpreadCase(case, *pair) for i, case in enumerate(of_kinds(ranks)) for pair in pairs[i % 5 :: 5]]
    results = rank_threads.run(failures_of, ranks, batch, None, timeout=600)
    assert [failure for failures in results for failure in failures] == []
