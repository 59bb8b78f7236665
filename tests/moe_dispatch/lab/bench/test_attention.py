"""Workloads of attention: who is in the table, who is refused, and what is told of each."""

import re
from dataclasses import replace

import pytest
import torch.distributed as dist

from moe_dispatch.lab.bench.config import AttentionConfig
from moe_dispatch.lab.bench.contenders.floor import BareAttention
from moe_dispatch.lab.bench.contenders.named import contenders_of
from moe_dispatch.lab.bench.contenders.protocol import NotApplicable
from moe_dispatch.lab.bench.measure import measure
from moe_dispatch.lab.bench.results import Line, largest
from moe_dispatch.lab.bench.workloads.attention import AttentionWorkload
from moe_dispatch.lab.bench.workloads.exact import exact_attention
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.lab.bench_workloads import CAUSAL

ADAPTERS = "tests.support.lab.adapters"
NAMES = [*contenders_of("attention", ""), "floor"]
TORCH = [name for name in NAMES if name.startswith("torch ")]


def lines_of(ranks: RankPool | RankThreads, config: AttentionConfig, adapter: str = "") -> dict[str, Line]:
    of_ranks = ranks.run(measure, config.ranks, config, adapter, 2, False, timeout=200)
    lines = [largest(list(of_name)) for of_name in zip(*(lines for lines, _ in of_ranks), strict=True)]
    return {line.name: line for line in lines}


def test_all_are_right_and_timed_and_a_wrong_one_is_refused(rank_pool: RankPool) -> None:
    lines = lines_of(rank_pool, replace(CAUSAL, ranks=2, seq=16), f"{ADAPTERS}:TakesZigzagForContiguous")
    refused = lines.pop("TakesZigzagForContiguous")
    assert refused.wrong
    assert re.match(r"rank \d: the output is off by ", refused.absent)
    assert list(lines) == NAMES
    for line in lines.values():
        assert (line.absent, line.wrong) == ("", False)
        assert len(line.both_ms) == 2
        assert [len(of_rank) for of_rank in line.processor_ms] == [2] * 2
        assert min(line.processor_ms_of_rank) > 0
        assert 1 <= line.fullest_rank <= 2
    # both ranks: 2 x 2 x 8 tokens, of 8 heads there and back and of 4 heads of keys and of values, half of them
    sent = 2 * 2 * 8 * (8 + 8 + 4 + 4) * 4 * 8 // 2
    textbook, torch_ring = lines["textbook"], lines["torch ring zigzag"]
    assert textbook.forward is not None
    assert textbook.backward is not None
    assert textbook.forward.all_ranks_bytes == textbook.backward.all_ranks_bytes == sent
    assert textbook.forward.wire_bytes == sent // 2
    assert torch_ring.forward is not None
    assert torch_ring.forward.all_ranks_bytes == 2 * 2 * 8 * (4 + 4) * 4 * 8
    assert lines["floor"].forward is None


def test_windows_and_uneven_shards_are_for_those_that_can(rank_threads: RankThreads) -> None:
    uneven = replace(CAUSAL, ranks=2, seq=(9, 4), heads=3, kv_heads=1, dtype="bfloat16", window=3)
    lines = lines_of(rank_threads, uneven, f"{ADAPTERS}:Attention")
    assert lines["Attention"].wrong  # it has no window
    absent = {name: line.absent for name, line in lines.items() if line.absent and not line.wrong}
    assert list(absent) == ["textbook", *TORCH]
    assert absent["textbook"] == "needs even shards; tokens per rank are (9, 4)"
    lines = lines_of(rank_threads, replace(CAUSAL, ranks=2, window=3))
    assert [name for name, line in lines.items() if line.absent] == TORCH
    assert all(len(line.both_ms) == 2 for name, line in lines.items() if name not in TORCH)


def why_absent(config: AttentionConfig, name: str) -> str:
    group = dist.group.WORLD
    assert group is not None
    with pytest.raises(NotApplicable) as error:
        contenders_of("attention", "")[name](AttentionWorkload.of(config), group)
    return str(error.value)


def test_teams_that_do_not_fill_the_ranks_are_absent(rank_threads: RankThreads) -> None:
    told = "teams of 2 head ranks in a group of 3; head_ranks has to divide the number of ranks"
    assert rank_threads.run(why_absent, 3, replace(CAUSAL, ranks=3, seq=24), "2-D zigzag") == [told] * 3


def floor_is_off(config: AttentionConfig) -> float:
    """Of the output and the gradient of the queries of this rank's heads, the largest difference to exact ones."""
    group, workload = dist.group.WORLD, AttentionWorkload.of(config)
    assert group is not None
    out_BLNH, grad_BLNH, _, _ = exact_attention(workload, group)
    floor = BareAttention(workload, group)
    out_BLnH = floor.forward()
    grad_BLnH = floor.backward(out_BLnH)[0]
    assert grad_BLnH is not None
    start, size = (of_rank[group.rank()] for of_rank in (workload.heads.offsets, workload.heads.sizes))
    pairs = ((out_BLnH, out_BLNH), (grad_BLnH, grad_BLNH)) if size else ()
    assert out_BLnH.shape[2] == size
    return max(((got - want[:, :, start : start + size]).abs().max().item() for got, want in pairs), default=0.0)


@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(8, 4, -1), (10, 2, 5), (1, 1, -1)])
def test_the_floor_computes_the_heads_of_each_rank(
    rank_threads: RankThreads, heads: int, kv_heads: int, window: int
) -> None:
    """Whole groups of heads, a rank with 2 heads of one group and 1 of the next, and ranks without heads."""
    config = replace(CAUSAL, heads=heads, kv_heads=kv_heads, window=window)
    assert max(rank_threads.run(floor_is_off, 4, config)) < 1e-12


def test_the_fullest_rank_is_told_over_the_mean() -> None:
    line = Line(name="x", processor_ms=((1.0, 9.0, 2.0), (4.0, 4.0, 4.0)))
    assert line.processor_ms_of_rank == (2.0, 4.0)
    assert line.fullest_rank == pytest.approx(4 / 3)


def test_an_adapter_of_attention_is_timed_with_attention_only() -> None:
    adapter = f"{ADAPTERS}:Attention"
    assert list(contenders_of("attention", adapter))[-1] == "Attention"
    assert "Attention" not in contenders_of("ulysses", adapter)
