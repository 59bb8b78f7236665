"""What is around a forward: wrappers and their names, other contexts, exceptions, copies, pipelines."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from moe_dispatch import MoE, RoutingRecord, TokenSharding, leave_experts_to_ranks, record_routing, replay_routing
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.moe import Case, Stage
from tests.support.ranks import refusal, world
from tests.support.routing.stack import NAMES, Stack, move, run_forwards, stack_of

CASE = Case(seq=(3, 2), experts=(2, 3))


def is_left_alone(stack: nn.Module) -> bool:
    """Nothing of a context is left, not even hooks."""
    layers = [module for module in stack.modules() if isinstance(module, MoE)]
    return not any(layer.routing_site().tap.is_used or layer._forward_hooks for layer in layers)


def chosen(model: nn.Module, rank: int) -> RoutingRecord:
    with record_routing(model) as record:
        run_forwards(model, CASE, rank)
    return record


def ddp(stack: Stack) -> nn.Module:
    leave_experts_to_ranks(stack)
    return DistributedDataParallel(stack)


def fsdp1(stack: Stack) -> nn.Module:
    experts = [layer.get_submodule("experts") for layer in stack.layers]
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(stack, ignored_modules=experts, device_id=cpu, use_orig_params=True)


def fsdp2(stack: Stack) -> nn.Module:
    return fully_shard(stack, ignored_params={p for layer in stack.layers for p in layer.experts.parameters()})  # pyright: ignore


def checkpointed(stack: Stack) -> nn.Module:
    stack.layers = nn.ModuleList(map(checkpoint_wrapper, stack.layers))
    return stack


def compiled(stack: Stack) -> nn.Module:
    return torch.compile(stack, backend="eager")  # pyright: ignore[reportReturnType]


WRAPPERS: dict[str, Callable[[Stack], nn.Module]] = {
    "ddp": ddp, "fsdp1": fsdp1, "fsdp2": fsdp2, "checkpointed": checkpointed, "compiled": compiled,
}  # fmt: skip


def wrapped(rank: int, wrapper: str) -> None:
    plain, stack = stack_of(CASE, rank), stack_of(CASE, rank)
    record = chosen(plain, rank)
    assert list(record.layers) == NAMES
    model = WRAPPERS[wrapper](stack)
    assert chosen(model, rank) == record
    move(plain.layers)
    other = chosen(plain, rank)
    with replay_routing(model, other):
        again = chosen(model, rank)
    assert again == other
    assert again != record
    assert chosen(model, rank) == record  # no context, no replay
    assert is_left_alone(model)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_are_those_without_wrappers(rank_pool: RankPool, wrapper: str) -> None:
    rank_pool.run(wrapped, 2, wrapper)


def ended_by_exceptions(rank: int) -> None:
    stack = stack_of(CASE, rank)
    kept = chosen(stack, rank)
    records = list[RoutingRecord]()

    def fail(forwards: int) -> None:
        with record_routing(stack) as record, replay_routing(stack, kept):
            records.append(record)
            run_forwards(stack, CASE, rank, forwards)
            raise KeyError("mine")

    for forwards in (1, 0):  # and no word of the one that is left
        with pytest.raises(KeyError, match="mine"):
            fail(forwards)
    assert records == [RoutingRecord({})] * 2
    assert is_left_alone(stack)


def test_an_exception_ends_a_context(rank_threads: RankThreads) -> None:
    rank_threads.run(ended_by_exceptions, 2)


def copies_and_others(rank: int) -> None:
    """A copy made in a context, and another model that runs in it, are none of its business."""
    stack, other = stack_of(CASE, rank), stack_of(CASE, rank)
    move(other.layers)
    others = chosen(other, rank)
    mine = chosen(stack, rank)
    with record_routing(stack) as record, replay_routing(stack, others), record_routing(other) as of_other:
        copied = copy.deepcopy(stack)
        assert is_left_alone(copied)
        run_forwards(stack, CASE, rank)
        assert chosen(copied, rank) == mine
        with replay_routing(other, mine):
            run_forwards(other, CASE, rank)
    assert record == others
    assert of_other == mine


def test_copies_and_other_models_are_left_alone(rank_threads: RankThreads) -> None:
    rank_threads.run(copies_and_others, 2)


def outer_and_inner(rank: int) -> None:
    stack = stack_of(CASE, rank)
    with record_routing(stack) as both:
        with record_routing(stack) as first:
            run_forwards(stack, CASE, rank)
        run_forwards(stack, CASE, rank)
    assert [len(x) for x in first.layers.values()] == [1, 1]
    assert [len(x) for x in both.layers.values()] == [2, 2]
    assert is_left_alone(stack)


def test_contexts_in_contexts(rank_threads: RankThreads) -> None:
    rank_threads.run(outer_and_inner, 2)


def in_inference(rank: int) -> None:
    """Recorded without gradients, replayed with them, and the other way round."""
    stack = stack_of(CASE, rank).eval()
    x_BlD = CASE.shards(rank)[0]
    with torch.inference_mode(), record_routing(stack) as record:
        wanted_BlD = stack(x_BlD, CASE.sharding)
    move(stack.layers)
    with replay_routing(stack, record):
        y_BlD = stack(x_BlD, CASE.sharding)
    y_BlD.sum().backward()
    assert not torch.equal(y_BlD, wanted_BlD)  # other weights
    with torch.inference_mode(), replay_routing(stack, record), record_routing(stack) as again:
        assert torch.equal(stack(x_BlD, CASE.sharding), y_BlD)
    assert again == record


def test_inference(rank_threads: RankThreads) -> None:
    rank_threads.run(in_inference, 2)


def test_a_model_without_layers_is_refused() -> None:
    text = (
        "no layer of this Linear chooses experts; pass the model that holds the MoE layers (a stage of a pipeline "
        "without any needs no record). Models of Transformers have functions of the same names, in "
        "moe_dispatch.integrations.transformers"
    )
    assert refusal(lambda: record_routing(nn.Linear(2, 2)).__enter__()) == text
    assert refusal(lambda: replay_routing(nn.Linear(2, 2), RoutingRecord({})).__enter__()) == text


def in_a_pipeline(rank: int) -> tuple[int, int, bool]:
    """Forwards that were recorded and replayed by a stage, with the pass that learns shapes: two of two microbatches;
    and whether the replay chose what was recorded."""
    place = CASE.sharding
    micro = TokenSharding(batch=1, seq=place.seq)
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    columns = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    number, seat = (0, rank) if rank < 2 else (1, rank - 2)
    moe = CASE.layer(seat, group=groups[number])  # pyright: ignore[reportArgumentType]

    def step(block: Stage) -> None:
        stage = PipelineStage(block, number, 2, torch.device("cpu"), group=columns[seat])  # pyright: ignore
        schedule = ScheduleGPipe(stage, 2, loss_fn=lambda y, target: (y * target).sum())
        x_BlD = place.shard(torch.randn(2, 5, 8, dtype=torch.float64), seat).contiguous()
        schedule.step(*([] if number else [x_BlD]), target=x_BlD if number else None, sharding=micro)

    block = Stage(moe)
    with record_routing(block) as record:
        step(block)
    torch.manual_seed(1)  # other tokens
    with record_routing(block) as again, replay_routing(block, record):
        step(block)
    # Both stages call their layer "moe": only the ranks of one can be put together.
    assert "moe, forward 0: token" in refusal(lambda: record.gather(world()))
    assert record.gather(moe.group).layers["moe"][0].is_whole
    return len(record.layers["moe"]), len(again.layers["moe"]), record == again


def test_a_pipeline_records_and_replays_its_microbatches_only(rank_pool: RankPool) -> None:
    assert rank_pool.run(in_a_pipeline, 4) == [(2, 2, True)] * 4


def as_decorator(rank: int) -> int:
    stack = stack_of(CASE, rank)
    record = chosen(stack, rank)
    run = replay_routing(stack, record)(partial(run_forwards, stack, CASE, rank))
    return len(run())


def test_a_context_is_a_decorator_too(rank_threads: RankThreads) -> None:
    assert rank_threads.run(as_decorator, 2) == [1, 1]
