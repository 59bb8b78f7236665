"""Layers of one process, in a model, become layers over the ranks of a mesh."""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from moe_dispatch import GroupedExperts, MoE, ParallelMesh, Partition, agree
from moe_dispatch.internals import is_dtensor
from moe_dispatch.reference import ReferenceMoE

from ..call.module import AttentionOverRanks, UlyssesAttention
from ..reference import ReferenceAttention
from ..work.scheme import ULYSSES, Scheme, problem_of_scheme

OfOneProcess = ReferenceMoE | ReferenceAttention


def spread_layers(
    model: nn.Module, mesh: ParallelMesh, experts: Partition | None, scheme: Scheme, group: dist.ProcessGroup
) -> None:
    """See :meth:`Parallel.apply`."""
    ep, sp = mesh.expert.get_group("ep"), mesh.dense.get_group("sp")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, OfOneProcess)}
    facts = "; ".join(f"{name} {_facts(layer, experts)}" for name, layer in layers.items())
    device = torch.device(mesh.dense.device_type)
    problem = _problem(layers, experts, ep.size()) or problem_of_scheme(scheme, sp.size())
    agree(f"{facts}; {scheme}", problem=problem, device=device, group=group)
    of_old: dict[int, nn.Module] = {}  # a layer or experts in two places stay one
    for layer in dict.fromkeys(layers.values()):
        if isinstance(layer, ReferenceAttention):
            new = _attention(layer, scheme, sp)
        else:
            partition = experts or Partition.balanced(layer.router.num_experts, ep.size())
            if id(layer.experts) not in of_old:
                of_old[id(layer.experts)] = _share(layer.experts, partition, ep.rank())
            mine = cast(GroupedExperts, of_old[id(layer.experts)])
            new = MoE(router=layer.router, experts=mine, partition=partition, group=ep, shared=layer.shared)
        new.training = layer.training  # not that of what is in it
        of_old[id(layer)] = new
    for module in list(model.modules()):
        for name, child in module._modules.items():  # named_children leaves out what is there twice
            if isinstance(child, OfOneProcess):
                setattr(module, name, of_old[id(child)])


def _attention(layer: ReferenceAttention, scheme: Scheme, group: dist.ProcessGroup) -> AttentionOverRanks:
    options: dict[str, Any] = {"is_causal": layer.is_causal, "window": layer.window, "scale": layer.scale}
    if scheme == ULYSSES:
        return UlyssesAttention(group=group, **options)
    return AttentionOverRanks(group=group, scheme=scheme, **options)


@torch.no_grad()
def _share(whole: GroupedExperts, partition: Partition, rank: int) -> GroupedExperts:
    """The experts of ``rank``. A copy, so that the whole is freed with the layer that had it."""
    first, size = partition.offsets[rank], partition.sizes[rank]
    with torch.device("meta"):  # where nothing is drawn
        share = GroupedExperts(size, whole.dim, whole.hidden).train(whole.training)
    for name, weight_E in whole.named_parameters():
        weight_e = weight_E.detach().narrow(0, first, size).clone()
        setattr(share, name, nn.Parameter(weight_e, requires_grad=weight_E.requires_grad))
    return share


def _problem(layers: Mapping[str, OfOneProcess], experts: Partition | None, ranks: int) -> str:
    if not layers:
        return (
            "the model has no ReferenceMoE and no ReferenceAttention; layers that were built with a group need no "
            "apply"
        )
    if "" in layers:
        return "the model is itself the layer that has to be replaced; pass a module that holds it"
    if experts is not None and len(experts) != ranks:
        return f"{experts} is for {len(experts)} ranks, but ep is {ranks}; give it one size per rank of ep"
    for name, layer in layers.items():
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
            return f"{name} has hooks, which its layer over ranks would not have; register them after apply"
        if any(is_dtensor(weight) for weight in layer.parameters()):
            return f"{name} has DTensors as parameters; call apply before fully_shard"
        if isinstance(layer, ReferenceMoE) and experts is not None and experts.total != layer.router.num_experts:
            return (
                f"{name} has {layer.router.num_experts} experts, but {experts} has {experts.total}; give sizes that "
                "add up to that"
            )
    return ""


def _facts(layer: OfOneProcess, experts: Partition | None) -> str:
    if isinstance(layer, ReferenceAttention):
        return f"attention ({layer.extra_repr()})"
    shapes = [(tuple(weight.shape), str(weight.dtype)) for weight in layer.parameters()]
    return f"experts {shapes} over {'balanced' if experts is None else experts.sizes}"
