"""The attention that contenders are checked with equals the pair-by-pair reference."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch.lab.bench.config import AttentionConfig
from moe_dispatch.lab.bench.workloads import exact
from moe_dispatch.lab.bench.workloads.attention import AttentionWorkload
from moe_dispatch.testing import RankThreads
from sp_attention.reference import reference_attention

# 5 heads for 2 ranks, and blocks whose windows reach into the block before and into the one before that
UNEVEN = AttentionConfig(
    name="x", ranks=2, batch=2, seq=(9, 4), heads=5, kv_heads=1, head_dim=3, dtype="float64", window=-1
)


def exact_on_ranks(config: AttentionConfig) -> tuple[Tensor, ...]:
    group = dist.group.WORLD
    assert group is not None
    return exact.exact_attention(AttentionWorkload.of(config), group)


@pytest.mark.parametrize("window", [-1, 0, 3, 12])
@pytest.mark.parametrize(("heads", "kv_heads", "dtype"), [(5, 1, "float64"), (6, 3, "float64"), (4, 2, "float32")])
def test_it_equals_the_reference(
    rank_threads: RankThreads,
    monkeypatch: pytest.MonkeyPatch,
    window: int,
    heads: int,
    kv_heads: int,
    dtype: str,
) -> None:
    monkeypatch.setattr(exact, "BLOCK", 4)
    config = replace(UNEVEN, window=window, heads=heads, kv_heads=kv_heads, dtype=dtype)  # type: ignore[arg-type]
    workload = AttentionWorkload.of(config)
    *inputs, grad = (x.double() for x in workload.whole)
    leaves = [x.requires_grad_() for x in inputs]
    out = reference_attention(*leaves, is_causal=True, window=None if window < 0 else (window, -1))  # type: ignore[arg-type]
    wanted = (out.detach(), *torch.autograd.grad(out, leaves, grad))
    for results in rank_threads.run(exact_on_ranks, 2, config):
        for got, want in zip(results, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_case_is_a_rank_s_share_in_the_order_of_its_contender() -> None:
    workload = AttentionWorkload.of(UNEVEN)
    whole = tuple(x.double() for x in workload.whole)
    for order in ("contiguous", "zigzag"):
        sharding = workload.in_order(order)
        for rank in range(2):
            case = workload.case(rank, sharding, (whole[0], *whole[:3]))
            for got, of in zip(
                (*case.inputs, case.grad_out, case.out, *case.grads), (*whole, *whole[:1], *whole[:3]), strict=True
            ):
                assert torch.equal(got.double(), sharding.shard(of, rank))
    assert workload.in_order("contiguous").places.lengths.sizes == (9, 4)
    assert workload.in_order("zigzag").runs(1) == ((4, 10),)  # pieces of 4, 3, 3, 3: rank 1 holds the middle ones
    assert not any(x.requires_grad for x in workload.whole)
