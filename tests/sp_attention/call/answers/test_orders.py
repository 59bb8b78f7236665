"""Attention in any order of tokens has the bits of contiguous shards: outputs, and all gradients."""

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankThreads
from sp_attention import heads_from_tokens, tokens_from_heads, ulysses_attention
from tests.support.attention.case import Case, named_case
from tests.support.attention.masks import CROSS, PACKED
from tests.support.attention.masks import KINDS as MASKS
from tests.support.attention.whole import Whole
from tests.support.orders import contiguous, cut_by_loops, drawn_lists, shardings, whole_by_loops
from tests.support.ranks import world
from tests.support.tensors import Order, grad_of, leaf

pytestmark = pytest.mark.usefixtures("uncovered")

ORDERS: tuple[Order, Order] = ("BL", "LB")
KINDS = ("causal", "causal window", "holes", "sinks and mask", "float (BNLL)", "masked documents", "cross causal")
Shardings = tuple[TokenSharding, TokenSharding]


def attended(
    rank: int, whole: Whole, of_calls: list[Shardings], options: dict[str, Any] | None = None
) -> list[dict[str, Tensor]]:
    """Of each call, this rank's output and gradients; those of options are of this rank's heads."""
    found = []
    for sharding, kv_sharding in of_calls:
        torch.manual_seed(3)  # of dropout
        q_BlNH = leaf(cut_by_loops(whole.q_BLNH, sharding, rank))
        k_BlGH, v_BlGH = (leaf(cut_by_loops(x, kv_sharding, rank)) for x in (whole.k_BLGH, whole.v_BLGH))
        given: dict[str, Any] = (
            dict(whole.options) | {name: leaf(whole.options[name]) for name in whole.learned} | (options or {})
        )
        out_BlNH = ulysses_attention(
            q_BlNH, k_BlGH, v_BlGH, sharding=sharding, kv_sharding=kv_sharding, group=world(), **given
        )
        out_BlNH.backward(cut_by_loops(whole.grad_BLNH, sharding, rank))
        of_call = {"out": out_BlNH.detach(), "dq": grad_of(q_BlNH), "dk": grad_of(k_BlGH), "dv": grad_of(v_BlGH)}
        learned = {name: given[name].grad for name in whole.learned}
        found.append(of_call | {name: grad for name, grad in learned.items() if grad is not None})
    return found


def together(per_rank: list[dict[str, Tensor]], of_call: Shardings) -> dict[str, Tensor]:
    sharding, kv_sharding = of_call
    names = {"out": sharding, "dq": sharding, "dk": kv_sharding, "dv": kv_sharding}
    whole = {name: whole_by_loops([x[name] for x in per_rank], of) for name, of in names.items()}
    return whole | {
        f"d {name} of rank {rank}": x[name] for rank, x in enumerate(per_rank) for name in x if name not in names
    }


def calls(ranks: int, rows: int, lengths: tuple[int, int], order: Order) -> list[Shardings]:
    """Orders of queries and of keys, and at last contiguous shards of both."""

    def orders(length: int) -> list[TokenSharding]:
        sizes = Partition((1, length - 5, 0, 3, 1))
        return [
            TokenSharding.zigzag(batch=rows, length=length, ranks=ranks, order=order),
            TokenSharding.striped(batch=rows, length=length, ranks=ranks, stripe=2, order=order),
            TokenSharding(batch=rows, seq=sizes, held=(*[()] * (ranks - 1), (3, 0, 2, 4, 1)), order=order),
        ]

    found = list(zip(orders(lengths[0]), orders(lengths[1])[:: 1 if lengths[0] == lengths[1] else -1], strict=True))
    return [*found, (contiguous(found[0][0]), contiguous(found[0][1]))]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_bits_of_contiguous_shards(ranks: int, kind: str, order: Order, rank_threads: RankThreads) -> None:
    batch = 1 if kind == "masked documents" else 3
    length, of_keys = 13, (9,) if kind in CROSS else None
    case: Case = named_case(ranks, kind, (length,), batch=batch, num_heads=(4, 2), widths=(4, 6), kv_seq=of_keys)
    whole = Whole.of(case, torch.float64)
    of_calls = calls(ranks, batch, case.lengths, order)
    *found, wanted = [
        together(list(per_rank), of_call)
        for per_rank, of_call in zip(
            zip(*rank_threads.run(attended, ranks, whole, of_calls), strict=True), of_calls, strict=True
        )
    ]
    for got, of_call in zip(found, of_calls, strict=False):
        assert got.keys() == wanted.keys()
        assert [name for name, x in wanted.items() if not torch.equal(got[name], x)] == [], of_call


def drawn_case(seed: int) -> tuple[Case, list[Shardings]]:
    """Any mask, lists of pieces, lengths and heads; contiguous shards at last."""
    draw = random.Random(seed)
    kind, ranks, order = list(MASKS)[seed % len(MASKS)], draw.randint(1, 4), draw.choice(ORDERS)
    is_packed = kind in PACKED
    batch = 1 if is_packed else draw.randint(1, 3)

    def drawn(length: int) -> TokenSharding:
        ends = sorted(draw.randint(0, length) for _ in range(draw.randint(0, 7)))
        seq = Partition(b - a for a, b in pairwise([0, *ends, length]))
        return TokenSharding(batch=batch, seq=seq, held=drawn_lists(len(seq), ranks, draw), order=order)

    lengths = draw.choice((1, ranks, 7, 23)), draw.choice((2, 9, 23))
    heads = draw.choice(((1, 1), (4, 2), (6, 3), (3, 1)))
    kv_seq = (lengths[1],) if kind in CROSS else None
    case = named_case(ranks, kind, (lengths[0],), batch=batch, num_heads=heads, widths=(4, 6), kv_seq=kv_seq)
    of_queries = drawn(lengths[0])
    of_keys = drawn(lengths[1]) if kind in CROSS else of_queries
    return case, [(of_queries, of_keys), (contiguous(of_queries), contiguous(of_keys))]


@pytest.mark.parametrize(
    "seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.sweep) for seed in range(8, 400))]
)
def test_drawn_orders_have_the_bits_of_contiguous_shards(seed: int, rank_threads: RankThreads) -> None:
    case, of_calls = drawn_case(seed)
    whole = Whole.of(case, torch.float64)
    per_rank = rank_threads.run(attended, case.ranks, whole, of_calls)
    got, wanted = (
        together(list(x), of_call) for x, of_call in zip(zip(*per_rank, strict=True), of_calls, strict=True)
    )
    assert [name for name, x in wanted.items() if not torch.equal(got[name], x)] == [], (case, of_calls[0])


def test_dropout_has_the_pattern_of_contiguous_shards(rank_threads: RankThreads) -> None:
    whole = Whole.of(named_case(3, "causal", (11,), num_heads=(4, 2), widths=(4, 6)), torch.float64)
    of_calls = calls(3, 2, (11, 11), "BL")
    per_rank = rank_threads.run(attended, 3, whole, of_calls, {"dropout_p": 0.4})
    *found, wanted = [
        together(list(x), of_call) for x, of_call in zip(zip(*per_rank, strict=True), of_calls, strict=True)
    ]
    assert all(torch.equal(got[name], x) for got in found for name, x in wanted.items())


def traded(rank: int, cases: list[TokenSharding], heads: Partition) -> list[Tensor]:
    """All tokens of my heads; there and back is checked here."""
    found = []
    for sharding in cases:
        batch, length = sharding.batch.total, sharding.seq.total
        x_BLNH = torch.arange(batch * length * heads.total * 2.0).view(batch, length, heads.total, 2)
        x_BlNH = leaf(cut_by_loops(x_BLNH, sharding, rank))
        x_BLnH = heads_from_tokens(x_BlNH, sharding=sharding, heads=heads, group=world())
        back_BlNH = tokens_from_heads(x_BLnH, sharding=sharding, heads=heads, group=world())
        assert torch.equal(back_BlNH, x_BlNH)
        (back_BlNH * x_BlNH.detach()).sum().backward()
        assert torch.equal(grad_of(x_BlNH), x_BlNH.detach())
        whole_BLNH = x_BLNH if sharding.order == "BL" else x_BLNH.transpose(0, 1)
        mine = slice(heads.offsets[rank], heads.offsets[rank] + heads.sizes[rank])
        assert torch.equal(x_BLnH, whole_BLNH[:, :, mine])
        found.append(x_BLnH.detach())
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_tokens_of_any_order_are_traded_for_heads(ranks: int, order: Order, rank_threads: RankThreads) -> None:
    cases = [sharding for rows in (1, 2, 3) for sharding in shardings(ranks, rows, order)]
    rank_threads.run(traded, ranks, cases, Partition((2, 0, 3, 1)[:ranks]))
