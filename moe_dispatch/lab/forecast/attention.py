"""What attention of a sequence over ranks costs, in every scheme and order of tokens, and which is cheapest for other
numbers of ranks."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from sp_attention import Machine, Scheme, SchemeCost
from sp_attention.choice.candidates import name_of, other_orders, schemes
from sp_attention.choice.choose import Call
from sp_attention.work.traffic import Sizes

from ... import Partition, TokenSharding
from .config import MOST_SEQUENCE_RANKS, AttentionDims, PlanConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRow:
    """One scheme in one order of tokens."""

    ranks: int
    order: str
    name: str
    cost: SchemeCost


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionForecast:
    """What the attention part of a plan says.

    Attributes:
        rows: of the ranks that were asked for: every scheme in the order in which the cheapest is, then the cheapest
            in every other order; each the cheapest first.
        by_ranks: for 2, 4, 8 ranks and so on, the cheapest of all schemes and orders.
    """

    rows: tuple[AttentionRow, ...]
    by_ranks: tuple[AttentionRow, ...]


def forecast_attention(config: PlanConfig, attention: AttentionDims) -> AttentionForecast:
    rows = sorted(_by_order(config, attention, schemes), key=lambda of_order: of_order[0].cost.milliseconds)
    doubled = [2**i for i in range(1, int(math.log2(MOST_SEQUENCE_RANKS)) + 1)]
    return AttentionForecast(
        rows=(*rows[0], *(of_order[0] for of_order in rows[1:])),
        by_ranks=tuple(_cheapest(config, replace(attention, ranks=ranks)) for ranks in doubled),
    )


def _cheapest(config: PlanConfig, attention: AttentionDims) -> AttentionRow:
    first = (rows[0] for rows in _by_order(config, attention, _kept_schemes))
    return min(first, key=lambda row: row.cost.milliseconds)


def _kept_schemes(ranks: int) -> list[Scheme]:
    """Those of which one is cheapest: what is gathered again or in turns takes less memory, and never less time."""
    return [scheme for scheme in schemes(ranks) if scheme.keep]


def _by_order(
    config: PlanConfig, attention: AttentionDims, schemes_of: Callable[[int], list[Scheme]]
) -> Iterator[list[AttentionRow]]:
    """For every order of tokens, all schemes, the cheapest first."""
    ranks, cluster = attention.ranks, config.cluster
    machine = Machine(
        ranks_per_node=cluster.ranks_per_node,
        intra_gb_s=cluster.intra_gb_s,
        inter_gb_s=cluster.inter_gb_s,
        latency_us=cluster.latency_us,
        tflop_s=attention.tflop_s,
    )
    sizes = Sizes(
        batch=1,
        query=attention.width,
        output=attention.value_width,
        keys=attention.width + attention.value_width,
        value_bytes=getattr(torch, config.model.dtype).itemsize,
    )
    contiguous = TokenSharding(batch=1, seq=Partition.balanced(attention.length, ranks))
    cu_seqlens = torch.tensor([0, *accumulate(attention.documents)]) if attention.documents else None
    call = Call.of(
        (contiguous, contiguous),
        (attention.heads, attention.kv_heads),
        (attention.window or -1, 0),
        (cu_seqlens, cu_seqlens),  # what comes after the last document is padding
        sizes,
        own_attend=False,
    )
    some = schemes_of(ranks)
    for name, order in {"contiguous": contiguous, **other_orders(contiguous, call.documents)}.items():
        costs = call.costs(order, order, some, machine, math.inf)
        yield [AttentionRow(ranks=ranks, order=name, name=name_of(each.scheme, ranks), cost=each) for each in costs]
