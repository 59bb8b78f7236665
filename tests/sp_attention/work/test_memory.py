"""Bytes of a rank, counted by hand; tests/sp_attention/call/schemes/test_kept.py has those of real calls."""

from dataclasses import replace

import pytest

from moe_dispatch import Partition
from sp_attention import Scheme
from sp_attention.wire.heads import GroupedHeads
from sp_attention.work.memory import Memory, memory_of
from sp_attention.work.plan import Work
from sp_attention.work.seen import Seen
from sp_attention.work.traffic import Sizes

SIZES = Sizes(batch=1, query=1, output=1, keys=2, value_bytes=2)
HEADS = GroupedHeads(Partition((1, 1)), 2)
# 2 ranks of 4 queries and 4 keys, all seen; each works on all 8 for one head. Two at a time: turns of 4 bytes of
# queries, and of 8 of keys and values.
WORK = Work(
    scheme=Scheme.ulysses(keep=False, chunk=2),
    held=(((0, 4),), ((4, 8),)),
    kv_held=(((0, 4),), ((4, 8),)),
    seen=Seen([(0, 8, 0, 8)], (-1, -1)),
    heads=HEADS,
    key_heads=HEADS.kv_spans,
    at_once=False,
)
OUTPUTS, SUMS, CAME = 8 * 2, 8 * 4, 8 * 2 + 8 * 4


@pytest.mark.parametrize(
    ("keep", "offload", "wanted"),
    [
        # All 4 turns of keys wait for the further queries; before the last of the first queries' turns, and after it,
        # the queries of 2 turns are there.
        (False, False, Memory(kept=OUTPUTS + SUMS, arriving=4 * 8 + 2 * 4, most=OUTPUTS + SUMS + 4 * 8 + 2 * 4)),
        (True, False, Memory(kept=OUTPUTS + SUMS + CAME, arriving=4 * 8 + 2 * 4, most=OUTPUTS + SUMS + CAME)),
        # Keys wait on the host: those before, those that are there, and those that come.
        (False, True, Memory(kept=OUTPUTS + SUMS, arriving=3 * 8 + 4, most=3 * 8 + 4)),
    ],
)
def test_what_waits(keep: bool, offload: bool, wanted: Memory) -> None:
    work = replace(WORK, scheme=replace(WORK.scheme, keep=keep, offload=offload))
    assert memory_of(work, SIZES, 0) == wanted
