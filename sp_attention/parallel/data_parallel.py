"""FSDP2 around a module whose experts some ranks share and whose other parameters all ranks share."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from moe_dispatch import ParallelMesh
from moe_dispatch.internals import expert_layers


def shard_over_ranks(module: nn.Module, mesh: ParallelMesh, options: Mapping[str, Any]) -> None:
    """See :meth:`OnMesh.fully_shard`."""
    from torch.distributed.fsdp import FSDPModule, fully_shard  # 0.4 s, in every process that has no use for it

    tp = mesh.dense["tp"].size()
    if tp > 1:
        raise ValueError(
            f"fully_shard on a mesh with tp = {tp}: what is split over tp and what is not need meshes of their own; "
            'call torch\'s fully_shard for each, with mesh.dense["dp", "sp"] for what is split'
        )
    layers = list(expert_layers(module))
    ignored: set[nn.Parameter] = set(options.get("ignored_params") or ())
    for _, experts in layers:
        if isinstance(experts, FSDPModule):
            continue
        if any(weight.numel() for weight in experts.parameters()):
            fully_shard(experts, mesh=mesh.expert["edp"], **options)
        else:  # FSDP2 cannot reduce gradients without elements
            ignored.update(experts.parameters())
    if not isinstance(module, FSDPModule):
        all_ranks = init_device_mesh(mesh.dense.device_type, (dist.get_world_size(),))
        fully_shard(module, mesh=all_ranks, **{**options, "ignored_params": ignored})
    # A rank whose experts are no FSDPModule would prefetch the layer before this one, and its peers their experts:
    # the collectives of all ranks and of the "ep" group then come in another order, and wait for each other.
    orders_differ = any(0 in layer.partition.sizes for layer, _ in layers)
    for sharded in module.modules():
        if isinstance(sharded, FSDPModule):
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has neither AVG nor PREMUL_SUM
            if orders_differ:
                sharded.set_modules_to_backward_prefetch([sharded])  # itself, so nothing
