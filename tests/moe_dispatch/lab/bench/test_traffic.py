"""What the contenders send and wait for, counted."""

import pytest
import torch
import torch.distributed as dist

from moe_dispatch.lab.bench.config import ExchangeConfig
from moe_dispatch.lab.bench.contenders.floor import rows_between
from moe_dispatch.lab.bench.contenders.named import contenders_of
from moe_dispatch.lab.bench.workloads.dispatch import DispatchWorkload
from moe_dispatch.lab.bench.workloads.of_config import cases_of, workload_of
from moe_dispatch.testing import RankPool
from moe_dispatch.testing.counting import Counts, counting, run_backward
from tests.support.lab.bench_workloads import ROUTED, TINY


def counts_of_layer(name: str, config: ExchangeConfig) -> tuple[Counts, Counts]:
    """What the forward and the backward of one contender do on this rank."""
    group = dist.group.WORLD
    assert group is not None
    workload = workload_of(config)
    contender = contenders_of(workload.kind, "")[name](workload, group)
    case = cases_of(workload, group)(contender)
    with counting() as forward:
        out = contender.forward(*case.inputs)
    with counting() as backward:
        run_backward(out, case.grad_out)
    torch.testing.assert_close(case.leaves[0].grad, case.grads[0].to(out.dtype))
    return forward, backward


@pytest.mark.parametrize("name", ["ours", "textbook"])
def test_three_collectives_and_one_host_sync_forward_and_two_collectives_backward(
    rank_pool: RankPool, name: str
) -> None:
    for forward, backward in rank_pool.run(counts_of_layer, 2, name, ROUTED):
        assert forward.collectives == ["c10d::alltoall_base_"] * 3
        assert backward.collectives == ["c10d::alltoall_base_"] * 2
        assert len(forward.host_syncs) == 1, forward.host_syncs
        assert backward.host_syncs == []


def test_bytes_to_oneself_are_not_on_the_wire(rank_pool: RankPool) -> None:
    once, per_choice = (rows_between(DispatchWorkload.of(ROUTED), once=once) for once in (True, False))
    results = rank_pool.run(counts_of_layer, 2, "textbook", ROUTED)
    for rank, (forward, backward) in enumerate(results):
        there, home = per_choice[rank][1 - rank], per_choice[1 - rank][rank]
        assert forward.wire_bytes == 2 * 8 + 4 * 7 * (there + home)  # the counts of 2 experts, int64
        assert backward.wire_bytes == 4 * 7 * (there + home)
    for rank, (_, backward) in enumerate(rank_pool.run(counts_of_layer, 2, "ours", ROUTED)):
        there, home = once[rank][1 - rank], once[1 - rank][rank]
        assert backward.wire_bytes == 4 * 7 * (there + home) + 4 * 2 * home  # K gradients of weights come along


@pytest.mark.parametrize(("name", "collectives"), [("ours", 2), ("textbook", 4)])
def test_attention_takes_two_collectives_each_way_and_the_textbook_four(
    rank_pool: RankPool, name: str, collectives: int
) -> None:
    for counts in rank_pool.run(counts_of_layer, 2, name, TINY.ulysses[0]):
        assert [len(passed.collectives) for passed in counts] == [collectives] * 2
