"""Wrappers of other packages around a module, on 4 ranks: 2 replicas (data parallel) of a group of 2, which have the
same data. So an average over replicas is what each of them has, and every wrapper gives what the module gives."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe_dispatch import GroupedExperts, leave_experts_to_ranks
from tests.support.composed.subjects import LAYOUTS, made, pulled, shards_of
from tests.support.composed.ways import Answers, of_module
from tests.support.tensors import leaf

LOW = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank's place in the mesh, and what it computes there."""

    mesh: DeviceMesh
    what: str
    layout: str
    dtype: torch.dtype = torch.float64

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh["part"].get_group()

    def module(self) -> nn.Module:
        return made(self.what, LAYOUTS[self.layout], self.group).to(self.dtype)

    def shards(self) -> tuple[Tensor, Tensor]:
        return shards_of(LAYOUTS[self.layout], self.group.rank(), self.dtype)

    def plainly(self) -> Answers:
        return of_module(self.module(), *self.shards())

    def in_low_precision(self) -> Answers:
        return replace(self, dtype=LOW).plainly()


@contextmanager
def placed(what: str, layout: str) -> Iterator[Place]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "part"))
    yield Place(mesh=mesh, what=what, layout=layout)


def whole(answers: Answers) -> Answers:
    """Without the wrapper's names and shards."""
    wholes = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in answers.items()}
    return {re.sub(r"^(_fsdp_wrapped_)?module\.", "", name): x for name, x in wholes.items()}


def experts_of(module: nn.Module) -> list[GroupedExperts]:
    return [part for part in module.modules() if isinstance(part, GroupedExperts)]


def with_fsdp2(place: Place, policy: MixedPrecisionPolicy, dtype: torch.dtype) -> Answers:
    """A rank without experts leaves them out, as the layer says."""
    module, (x_BlD, pull_BlD) = place.module(), place.shards()
    none = {p for experts in experts_of(module) if not experts.num_experts for p in experts.parameters()}
    for p in none:
        p.data = p.data.to(policy.param_dtype or p.dtype)
    fully_shard(module, mesh=place.mesh["replica"], mp_policy=policy, ignored_params=none)
    return whole(of_module(module, x_BlD.to(dtype), pull_BlD))


def exactly_with_fsdp2(place: Place) -> Answers:
    return with_fsdp2(place, MixedPrecisionPolicy(), place.dtype)


def mixed_with_fsdp2(place: Place, cast_inputs: bool) -> Answers:
    """Inputs in float32 that the policy casts, or that the caller has cast."""
    policy = MixedPrecisionPolicy(param_dtype=LOW, reduce_dtype=torch.float32, cast_forward_inputs=cast_inputs)
    return with_fsdp2(replace(place, dtype=torch.float32), policy, torch.float32 if cast_inputs else LOW)


def with_fsdp1(place: Place, low: bool) -> Answers:
    place = replace(place, dtype=torch.float32) if low else place
    module, (x_BlD, pull_BlD) = place.module(), place.shards()
    precision = MixedPrecision(param_dtype=LOW, reduce_dtype=torch.float32, buffer_dtype=torch.float32)
    ignored = experts_of(module)
    for experts in ignored:
        experts.to(LOW if low else place.dtype)
    wrapped = FullyShardedDataParallel(
        module,
        process_group=place.mesh["replica"].get_group(),
        sharding_strategy=ShardingStrategy.NO_SHARD,
        mixed_precision=precision if low else None,
        ignored_modules=ignored,
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    return whole(of_module(wrapped, x_BlD, pull_BlD))


def with_ddp(place: Place) -> Answers:
    module = place.module()
    leave_experts_to_ranks(module)
    wrapped = DistributedDataParallel(module, process_group=place.mesh["replica"].get_group())
    return whole(of_module(wrapped, *place.shards()))


def in_a_pipeline(place: Place, schedule: Callable[..., Any]) -> Answers:
    """Two stages, one per replica, each the module; as two of them one after the other, in two microbatches."""
    stage_of = place.mesh["replica"]
    module, (x_BlD, pull_BlD) = place.module(), place.shards()
    stage = PipelineStage(module, stage_of.get_local_rank(), 2, torch.device("cpu"), group=stage_of.get_group())
    run = schedule(stage, n_microbatches=2, loss_fn=pulled, scale_grads=False)
    microbatches = torch.cat([x_BlD, x_BlD])  # of the rows that the layout has
    pulls = torch.cat([pull_BlD, pull_BlD])
    if stage_of.get_local_rank() == 0:
        run.step(microbatches)
        outputs = torch.zeros(0)
    else:
        outputs = run.step(target=pulls)
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"y": outputs[: len(x_BlD)], **{name: grad / 2 for name, grad in grads.items() if grad is not None}}


def one_after_the_other(place: Place) -> Answers:
    """What the stage of this rank has, computed without a pipeline."""
    first = place.module()
    modules = [first, copy.deepcopy(first)]
    x_BlD, pull_BlD = place.shards()
    y_BlD = modules[1](modules[0](leaf(x_BlD)))
    pulled(y_BlD, pull_BlD).backward()
    stage = place.mesh["replica"].get_local_rank()
    grads = {name: p.grad for name, p in modules[stage].named_parameters()}
    return {"y": y_BlD.detach() if stage else torch.zeros(0), **{n: g for n, g in grads.items() if g is not None}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapper:
    run: Callable[[Place], Answers]
    wanted: Callable[[Place], Answers] = Place.plainly
    tolerance: float = 1e-12


# bfloat16: measured 0.01, relative to the largest value. Weights lie elsewhere in memory, so sums have another order.
WRAPPERS = {
    "FSDP2": Wrapper(run=exactly_with_fsdp2),
    "FSDP2, mixed precision, inputs cast": Wrapper(
        run=partial(mixed_with_fsdp2, cast_inputs=True), wanted=Place.in_low_precision, tolerance=0.03
    ),
    "FSDP2, mixed precision, inputs not cast": Wrapper(
        run=partial(mixed_with_fsdp2, cast_inputs=False), wanted=Place.in_low_precision, tolerance=0.03
    ),
    "FSDP1": Wrapper(run=partial(with_fsdp1, low=False)),
    "FSDP1, mixed precision": Wrapper(
        run=partial(with_fsdp1, low=True), wanted=Place.in_low_precision, tolerance=0.03
    ),
    "DDP": Wrapper(run=with_ddp),
    "pipeline, 1F1B": Wrapper(run=partial(in_a_pipeline, schedule=Schedule1F1B), wanted=one_after_the_other),
    "pipeline, GPipe": Wrapper(run=partial(in_a_pipeline, schedule=ScheduleGPipe), wanted=one_after_the_other),
}
