"""Experts that Transformers shards itself, with rows that travel by this library."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.distributed.expert_parallel import apply_expert_parallelism

from moe_dispatch.integrations.transformers import register_implementation
from moe_dispatch.plan.counted import Counted


def shard_by_transformers(model: Any, ep: int, tp: int = 1) -> None:
    """What ``from_pretrained`` does to experts of a model on all ranks, without FSDP2."""
    register_implementation()
    shape = (dist.get_world_size() // ep // tp, ep, tp)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("efsdp", "ep", "tp"))
    plan = model._expand_parallel_plan(model.ep_plan)
    apply_expert_parallelism(model, mesh["ep"], mesh["tp"], plan, ep_implementation="moe_dispatch")


def let_fsdp_sum(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
            module.set_gradient_divide_factor(1.0)


def whole_gradients_of_dtensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in gradients.items()}


@contextmanager
def planned_tokens() -> Iterator[list[int]]:
    """How many tokens each plan on this rank is about; in a process of its own."""
    found, plan = [], Counted.plan

    def spy(self: Any, expert_BlK: Any, weight_BlK: Any, terms: Any, group: Any) -> Any:
        found.append(terms.sharding.num_held)
        return plan(self, expert_BlK, weight_BlK, terms, group)

    Counted.plan = spy  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Counted.plan = plan  # type: ignore[method-assign]
