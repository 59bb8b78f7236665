"""What a case in a scheme sends by the plan, and what it sends when it runs, on ranks that are threads."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition
from moe_dispatch.testing import RankThreads
from sp_attention import attention_over_ranks, scaled_dot_product
from sp_attention.attend.documents import Documents
from sp_attention.attend.masks import sides_of
from sp_attention.wire.heads import GroupedHeads
from sp_attention.work.kept import Asked, work_of
from sp_attention.work.plan import Work
from sp_attention.work.traffic import Sizes, Traffic
from tests.support.attention.whole import Whole
from tests.support.orders import cut_by_loops
from tests.support.ranks import world
from tests.support.schemes import SpreadCase
from tests.support.tensors import leaf

Sent = dict[tuple[int, int], int]

Backward = Callable[[], None]


def work(each: SpreadCase, *, at_once: bool) -> Work:
    case, (sharding, kv_sharding) = each.case, each.shardings
    options = Whole.of(case, torch.float64).options
    documents, _ = Documents.read(
        options.get("cu_seqlens"), options.get("cu_seqlens_padded"), case.batch, case.lengths
    )
    spans = ((0, case.lengths[0], 0, case.lengths[1]),)
    if documents is not None:
        spans = tuple((start, stop, start, stop) for start, stop in documents.spans)
    num_heads, team = case.num_heads, each.scheme.team_size(case.ranks)
    heads = GroupedHeads(each.heads or Partition.balanced(num_heads[0], team), num_heads[1])
    asked = Asked(
        scheme=each.scheme,
        heads=heads,
        key_heads=heads.kv_spans,
        at_once=at_once,
        kv_sharding=kv_sharding,
        spans=spans,
        sides=sides_of(options.get("is_causal", False), options.get("window")),
    )
    return work_of(sharding, asked)


def sizes(each: SpreadCase, value_bytes: int) -> Sizes:
    width, v_width = each.case.widths
    return Sizes(batch=each.case.batch, query=width, output=v_width, keys=width + v_width, value_bytes=value_bytes)


def sent(ranks_of: RankThreads, each: SpreadCase, dtype: torch.dtype, *, at_once: bool) -> Traffic:
    """What really travels, collective by collective."""
    whole = Whole.of(each.case, dtype)

    def forward(rank: int) -> Backward:
        (sharding, kv_sharding), case = each.shardings, each.case
        q_BlNH = leaf(cut_by_loops(whole.q_BLNH, sharding, rank))
        k_BlGH, v_BlGH = (leaf(cut_by_loops(x, kv_sharding, rank)) for x in (whole.k_BLGH, whole.v_BLGH))
        out_BlNH = attention_over_ranks(
            q_BlNH,
            k_BlGH,
            v_BlGH,
            sharding=sharding,
            kv_sharding=kv_sharding if case.kind.startswith("cross") else None,
            group=world(),
            scheme=each.scheme,
            heads=each.heads,
            attend=scaled_dot_product if at_once else None,
            **whole.options,
        )
        return partial(out_BlNH.backward, cut_by_loops(whole.grad_BLNH, sharding, rank))

    return sent_by(ranks_of, each.case.ranks, forward)


def sent_by(ranks_of: RankThreads, ranks: int, forward: Callable[[int], Backward]) -> Traffic:
    """What travels in a forward of all ranks, and in the backward that it gives."""
    found: dict[int, list[list[int]]] = defaultdict(list)
    trade = dist.all_to_all_single

    def count(out: Tensor, rows: Tensor, received: list[int], given: list[int], **options: Any) -> Any:
        row_bytes = rows.element_size() * (rows[:1].numel() or 1)
        found[dist.get_rank()].append([number * row_bytes for number in given])
        return trade(out, rows, received, given, **options)

    def call(rank: int) -> int:
        """How many collectives forward has."""
        backward = forward(rank)
        num = len(found[rank])
        backward()
        return num

    with mock.patch.object(dist, "all_to_all_single", count):
        (num,) = set(ranks_of.run(call, ranks))
    exchanges = [
        {
            (source, to): number
            for source, numbers in enumerate(exchange)
            for to, number in enumerate(numbers)
            if number and source != to
        }
        for exchange in zip(*(found[rank] for rank in range(ranks)), strict=True)
    ]
    return Traffic(ranks=ranks, forward=tuple(exchanges[:num]), backward=tuple(exchanges[num:]))
