"""What travels of latents, to the byte: C values a token for all heads of a rank, not H + Hv for each."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from moe_dispatch.testing import RankThreads
from sp_attention import Scheme, latent_attention_over_ranks
from sp_attention.work.traffic import Traffic, traffic_of
from tests.support.attention.case import named_case
from tests.support.attention.whole import Whole
from tests.support.latent import TURNED, WIDE, expand, latents
from tests.support.orders import cut_by_loops
from tests.support.planned import Backward, sent, sent_by, sizes, work
from tests.support.ranks import world
from tests.support.schemes import SpreadCase
from tests.support.tensors import leaf

C, WIDTH, V_WIDTH = WIDE + TURNED, 6, 4
SCHEMES = [
    Scheme.gather(),
    Scheme.gather(keep=True, chunk=3),
    Scheme.ring(),
    Scheme.two_dimensional(head_ranks=2),
    Scheme.two_dimensional(head_ranks=2, keys="ring"),
    Scheme.ulysses(keep=False),
]


def sent_of_latents(ranks_of: RankThreads, each: SpreadCase) -> Traffic:
    whole = Whole.of(each.case, torch.float64)
    latent_BLC, *weights = latents(each.case)

    def forward(rank: int) -> Backward:
        sharding, _ = each.shardings
        out_BlNH = latent_attention_over_ranks(
            leaf(cut_by_loops(whole.q_BLNH, sharding, rank)),
            leaf(cut_by_loops(latent_BLC, sharding, rank)),
            expand=expand,
            weights=[leaf(x) for x in weights],
            sharding=sharding,
            group=world(),
            scheme=each.scheme,
            **whole.options,
        )
        return partial(out_BlNH.backward, cut_by_loops(whole.grad_BLNH, sharding, rank))

    return sent_by(ranks_of, each.case.ranks, forward)


def case_of(scheme: Scheme, num_heads: int = 4, seq: tuple[int, ...] = (5, 0, 9, 3)) -> SpreadCase:
    case = named_case(4, "causal", seq, num_heads=(num_heads, num_heads), widths=(WIDTH, V_WIDTH))
    return SpreadCase(replace(case, seed=1), scheme, "contiguous")  # an odd seed has balanced heads


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_sent_is_what_the_plan_counts(rank_threads: RankThreads, scheme: Scheme) -> None:
    each = case_of(scheme)
    planned_work = work(each, at_once=False)
    of_latents = replace(planned_work, key_heads=planned_work.heads.latent_spans)
    planned = traffic_of(of_latents, replace(sizes(each, 8), keys=C))
    got = sent_of_latents(rank_threads, each)
    assert got.forward == tuple({pair: n for pair, n in sent.items() if n} for sent in planned.forward)
    assert got.backward == tuple({pair: n for pair, n in sent.items() if n} for sent in planned.backward)


def keys_sent(traffic: Traffic, pair: tuple[int, int]) -> int:
    """Bytes of the second collective of forward, which is of queries and keys; the first is of words."""
    return traffic.forward[1][pair]


def test_ulysses_sends_each_latent_once_to_each_rank(rank_threads: RankThreads) -> None:
    """And none to a rank without heads; keys and values of 1 of 4 heads were the share of each."""
    batch, rows = 2, 5
    latent = sent_of_latents(rank_threads, case_of(Scheme.ulysses()))
    assert keys_sent(latent, (0, 1)) == batch * rows * (WIDTH + C) * 8
    few = sent_of_latents(rank_threads, case_of(Scheme.ulysses(), num_heads=2))
    assert keys_sent(few, (0, 1)) == batch * rows * (WIDTH + C) * 8
    assert (0, 3) not in few.forward[1]


def test_gathered_latents_are_narrower_by_all_heads(rank_threads: RankThreads) -> None:
    each = case_of(Scheme.gather())
    latent, whole = sent_of_latents(rank_threads, each), sent(rank_threads, each, torch.float64, at_once=False)
    assert set(latent.forward[1]) == set(whole.forward[1]) == {(0, 2), (0, 3), (2, 3)}
    for way in ("forward", "backward"):
        for narrow, wide in zip(getattr(latent, way)[1:], getattr(whole, way)[1:], strict=True):
            assert {pair: n * 4 * (WIDTH + V_WIDTH) for pair, n in narrow.items()} == {
                pair: n * C for pair, n in wide.items()
            }
