"""What keeps gradients from being summed: wrappers that reduced them, meshes and groups that leave ranks out."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .parameters import Parameters, is_on_mesh, wrapped_by


def why_not_summable(
    model: nn.Module, parameters: Parameters, group: dist.ProcessGroup, expert_group: dist.ProcessGroup | None
) -> str:
    """The first thing that this rank sees to be wrong; empty if nothing is."""
    checks = (
        _wrapped(model),
        _averaged(model),
        _meshes_too_small(parameters, group),
        _experts_without_replicas(parameters, group, expert_group),
        _sparse(parameters),
    )
    return next(filter(None, checks), "")


def _wrapped(model: nn.Module) -> str:
    for wrapper in ("DistributedDataParallel", "FullyShardedDataParallel"):
        if place := wrapped_by(wrapper, model):
            return (
                f"{wrapper} around {place} reduces its gradients by itself, and sums would be summed again; use one "
                "of the two (copies of experts that it leaves alone: sum_gradients(moe.experts, group=...) over the "
                "ranks that hold them)"
            )
    return ""


def _averaged(model: nn.Module) -> str:
    """FSDP2 that divides by its number of ranks, beside sums. Its setting is private to torch, as of 2.13."""
    for place, module in model.named_modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            state: Any = module._get_fsdp_state()  # pyright: ignore[reportCallIssue]
            for part in state._fsdp_param_groups:
                factor = part.gradient_divide_factor  # None is the number of ranks; others count on one rank, too
                if factor != 1.0 and (factor is not None or part.mesh_info.mesh.size() > 1):
                    return (
                        f"FSDP2 around {place or 'the model'} averages gradients, and all others are sums; call "
                        "set_gradient_divide_factor(1.0) on each FSDPModule (and before it "
                        "set_force_sum_reduction_for_comms(True) on gloo)"
                    )
    return ""


def _meshes_too_small(parameters: Parameters, group: dist.ProcessGroup) -> str:
    ranks = set(dist.get_process_group_ranks(group))
    for name, weight in parameters.on_mesh.items():
        if is_on_mesh(weight) and (missing := ranks - set(weight.device_mesh.mesh.flatten().tolist())):
            return (
                f"{name} is a DTensor whose mesh leaves out the ranks {sorted(missing)}, so its gradient is no sum "
                "over all; give fully_shard a mesh of all ranks of the group, e.g. of two dimensions, the first of "
                "copies"
            )
    return ""


def _experts_without_replicas(
    parameters: Parameters, group: dist.ProcessGroup, expert_group: dist.ProcessGroup | None
) -> str:
    for name, weight in parameters.experts.items():
        of_layer = parameters.moe_of_expert[name].group.size()
        copies = 1 if expert_group is None else expert_group.size()
        if is_on_mesh(weight):
            copies = weight.device_mesh.size()
        if of_layer * copies != group.size():
            return (
                f"{name} is in a layer over {of_layer} ranks, and its gradient would be summed over {copies} "
                f"rank{'s' * (copies > 1)} with the same experts, but there are {group.size()} ranks; their product "
                "has to be that number: pass expert_group, the ranks that hold the same experts "
                '(build_mesh(...).expert.get_group("edp"))'
            )
    return ""


def _sparse(parameters: Parameters) -> str:
    for name, weight in (parameters.replicated | parameters.experts).items():
        if weight.grad is not None and weight.grad.layout != torch.strided:
            return f"{name} has a sparse gradient; only dense ones are summed: use nn.Embedding(sparse=False)"
    return ""
