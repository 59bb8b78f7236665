"""MoE made on the meta device, and passes that are no training step: what they leave in the counts."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from moe_dispatch import GroupedExperts, MoE, Partition, StaticSizes, TokenSharding, TopKRouter
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.checkpoints import recomputed_reentrantly
from tests.support.dispatch.moe import Stage
from tests.support.ranks import world

SHARDING = TokenSharding(batch=1, seq=Partition((4, 4)))


def make(group: dist.ProcessGroup) -> MoE:
    return MoE(
        router=TopKRouter(16, 8, 2, score="softmax"),
        experts=GroupedExperts(4, 16, 32),
        partition=Partition((4, 4)),
        group=group,
        planner=StaticSizes(rows_per_pair=4, rows=16),
    )


def from_meta(real: MoE, how: str) -> MoE:
    with torch.device("meta"):
        moe = make(world())
    state = {name: x.clone() for name, x in real.state_dict().items()}
    if how == "assign":
        moe.load_state_dict(state, assign=True)
        return moe
    with torch.random.fork_rng():
        dirty = [torch.full((8,), 1000) for _ in range(2000)]  # what a process that has run leaves behind
        del dirty
        moe.to_empty(device="cpu")
    moe.load_state_dict(state)
    return moe


def steps(rank: int, how: str) -> list[list[float]]:
    """The bias after a step of a layer that was made on the device, and of one that was not."""
    torch.manual_seed(rank)
    real = make(world())
    dist.broadcast(real.router.weight_ED.data, 0)
    moe = from_meta(real, how)
    x_BlD = SHARDING.shard(torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0)), rank)
    for layer in (real, moe):
        layer(x_BlD, sharding=SHARDING)
        layer.check()
        layer.update_bias(0.5, world())
    return [layer.router.expert_bias_E.tolist() for layer in (real, moe)]


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_a_layer_from_meta_counts_as_one_from_the_device(rank_threads: RankThreads, how: str) -> None:
    for wanted, got in rank_threads.run(steps, 2, how):
        assert any(wanted)
        assert got == wanted


def counts(rank: int) -> list[int]:
    """Choices counted after a pass without gradients, and after that and a reentrant checkpoint."""
    moe, found = make(world()), []
    x_BlD = SHARDING.shard(torch.randn(1, 8, 16), rank)
    with torch.no_grad():
        moe(x_BlD, sharding=SHARDING)
    found.append(int(moe.load_E.sum()))
    recomputed_reentrantly(moe, x_BlD.requires_grad_(), SHARDING)[0].sum().backward()
    return [*found, int(moe.load_E.sum())]


def test_a_pass_without_gradients_counts_nothing(rank_threads: RankThreads) -> None:
    assert rank_threads.run(counts, 2) == [[0, 8]] * 2


def two_stages(rank: int, schedule: type[ScheduleGPipe] | type[Schedule1F1B], nan: bool) -> int:
    """Choices that were counted by both ranks of a stage in one step of four microbatches."""
    expert_groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    stage_groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    number, place = divmod(rank, 2)
    router, experts = TopKRouter(16, 8, 2, score="softmax"), GroupedExperts(4, 16, 32)
    group, column = expert_groups[number], stage_groups[place]
    assert isinstance(group, dist.ProcessGroup)
    assert isinstance(column, dist.ProcessGroup)
    moe = MoE(router=router, experts=experts, partition=Partition((4, 4)), group=group)
    stage = PipelineStage(Stage(moe), number, 2, torch.device("cpu"), group=column)
    step = schedule(stage, 4, loss_fn=lambda y, target: (y * target).sum()).step
    whole, micro = (TokenSharding(batch=batch, seq=Partition((3, 2))) for batch in (4, 1))
    x_BlD = whole.shard(torch.randn(4, 5, 16), place).contiguous()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(nan)  # fills with NaN what nobody filled
    try:
        step(*([] if number else [x_BlD]), target=x_BlD if number else None, sharding=micro)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    load_E = moe.load_E.clone()
    dist.all_reduce(load_E, group=group)
    return int(load_E.sum())


@pytest.mark.parametrize(("schedule", "nan"), [(Schedule1F1B, False), (ScheduleGPipe, True)])
def test_the_pass_of_a_pipeline_that_learns_shapes_is_no_step(
    rank_pool: RankPool, schedule: type[ScheduleGPipe] | type[Schedule1F1B], nan: bool
) -> None:
    """The stage runs once on tensors that nobody filled: 4 microbatches of 5 tokens with 2 choices are 40."""
    assert rank_pool.run(two_stages, 4, schedule, nan) == [40] * 4
