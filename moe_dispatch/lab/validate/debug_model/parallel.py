"""The debug model on a mesh, with what PyTorch has: DTensor tensor parallelism, FSDP2, and this library's MoE layer.

Which mesh a parameter is sharded over follows from which ranks hold the tokens that it sees:

- split over "tp" (heads, hidden units, vocabulary), and norms as SequenceParallel: FSDP over "dp" x "sp" above "tp";
- experts: each lives on one rank of "ep", FSDP over "edp";
- the rest works on each rank's own tokens, so every rank is a data rank for it: FSDP over all of them.

Each rank's loss counts its own tokens, so gradients are summed everywhere, never averaged.
"""

from collections.abc import Iterable
from copy import deepcopy
from typing import cast

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from .... import GroupedExperts, MoE, ParallelMesh, Partition, TopKRouter
from ..config.tables import ModelConfig
from .model import Block, DebugModel, DenseFeedForward, SparseFeedForward


def parallel_model(whole: DebugModel, config: ModelConfig, mesh: ParallelMesh) -> DebugModel:
    """``whole`` as this rank's part of a model on ``mesh``; ``whole`` itself is left alone."""
    group = mesh.expert.get_group("ep")
    partition = Partition.balanced(config.experts, group.size())
    first, mine = partition.offsets[group.rank()], partition.sizes[group.rank()]

    def make_moe(router: TopKRouter, shared: nn.Module | None) -> MoE:
        experts = GroupedExperts(mine, config.dim, config.expert_hidden)
        return MoE(router=router, experts=experts, partition=partition, group=group, shared=shared)

    device = mesh.dense.device_type
    model = DebugModel(config, make_moe).to(device=device, dtype=whole.embedding.weight.dtype)
    state = deepcopy(whole.state_dict())
    for name in state:
        if ".experts." in name:
            state[name] = state[name][first : first + mine]
    model.load_state_dict(state)
    split_over_tp(model, mesh.dense["tp"])
    shard_over_data(model, mesh)
    return model


def split_over_tp(model: DebugModel, tp: DeviceMesh) -> None:
    """Heads, hidden units and vocabulary over "tp"; norms on each rank's positions."""
    rowwise = RowwiseParallel(output_layouts=Partial(), use_local_output=False)
    for block in model.blocks:
        plan: dict[str, ParallelStyle] = {
            "attention_norm": SequenceParallel(use_local_output=True),
            "feed_forward_norm": SequenceParallel(use_local_output=True),
            "attention.query": ColwiseParallel(),
            "attention.key_value": ColwiseParallel(),
            "attention.out": rowwise,
        }
        if isinstance(block, Block) and isinstance(block.feed_forward, DenseFeedForward):
            plan |= {
                "feed_forward.dense.gate": ColwiseParallel(),
                "feed_forward.dense.up": ColwiseParallel(),
                "feed_forward.dense.down": rowwise,
            }
        parallelize_module(block, tp, plan)
    parallelize_module(
        model,
        tp,
        {
            "norm": SequenceParallel(use_local_output=True),
            "head": ColwiseParallel(output_layouts=Replicate(), use_local_output=False),
        },
    )


def shard_over_data(model: DebugModel, mesh: ParallelMesh) -> None:
    """FSDP2 over the ranks that see different tokens, which differ between kinds of parameters."""
    data, edp = mesh.dense["dp", "sp"]._flatten("data"), mesh.expert["edp"]
    everyone = init_device_mesh(mesh.dense.device_type, (dist.get_world_size(),), mesh_dim_names=("all",))
    for block in cast("Iterable[Block]", model.blocks):
        split: list[nn.Module] = [block.attention_norm, block.feed_forward_norm]
        split += [block.attention.query, block.attention.key_value, block.attention.out]
        if isinstance(block.feed_forward, SparseFeedForward):
            fully_shard(block.feed_forward.moe.get_submodule("experts"), mesh=edp)
        else:
            split.append(block.feed_forward)
        for module in split:
            fully_shard(module, mesh=data)
        register_fsdp_forward_method(block.attention.key_value, "with_weight")
        fully_shard(block, mesh=everyone)
    fully_shard(model.norm, mesh=data)
    fully_shard(model.head, mesh=data)
    fully_shard(model, mesh=everyone)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has neither AVG nor PREMUL_SUM
