"""The norm of all gradients of a model of which each rank holds a part, and gradients scaled by it."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import GroupError
from ..layer.share import expert_layers
from .parameters import Parameters, is_on_mesh, local_part, within_reach, wrapped_by

Groups = tuple[dist.ProcessGroup, ...]


@torch.no_grad()
def clip_grad_norm(
    model: nn.Module,
    max_norm: float,
    *,
    norm_type: float = 2.0,
    stage_group: dist.ProcessGroup | None = None,
    counted_elsewhere: Collection[nn.Parameter] = (),
    error_if_nonfinite: bool = False,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for a model of which each rank holds a part. Call it on every rank after the
    gradients were summed (:func:`sum_gradients`).

    The norm is that of one process with the whole model. What every rank holds counts once, what lies on a mesh once
    for each of its elements, and experts are summed over the group of their layer. Gradients are multiplied in place
    by ``min(1, max_norm / (norm + 1e-6))``.

    One all-reduce of a number or two for each mesh dimension that shards and each group of MoE layers. The host waits
    for nothing, unless ``error_if_nonfinite``.

    Args:
        model: its parameters without a gradient count as zero.
        norm_type: p of the p-norm, more than 0; ``math.inf`` for the largest absolute value.
        stage_group: the ranks, one per stage, that hold the other stages of a pipeline. Left out where ``model`` is
            the whole model.
        counted_elsewhere: parameters of ``model`` that another stage holds a copy of, and counts (an embedding that
            is the output head, too). They are scaled, but do not count here. Sum the gradients of the copies before.
        error_if_nonfinite: raise before anything is scaled.

    Returns:
        () the norm before clipping, the same on every rank, in float32, or float64 if a parameter is float64. NaN or
        infinite where a gradient of any rank is.

    Raises:
        GroupError: on every rank: a norm that is not finite, if asked for.
        ValueError: a ``norm_type`` that is none, FSDP1, whose ordinary tensors are pieces of parameters, or a
            parameter in ``counted_elsewhere`` that is none of the model's.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type is {norm_type!r}; use 2.0, another number above 0, or math.inf")
    if place := wrapped_by("FullyShardedDataParallel", model):
        raise ValueError(
            f"FullyShardedDataParallel around {place} holds pieces of parameters as ordinary tensors, of which "
            "nobody can tell that they are pieces; use FSDP2 (fully_shard)"
        )
    parameters = Parameters.of(model)
    everything = [*parameters.replicated.values(), *parameters.on_mesh.values(), *parameters.experts.values()]
    dtype = torch.float64 if any(weight.dtype == torch.float64 for weight in model.parameters()) else torch.float32
    devices = {weight.device for weight in everything}
    elsewhere = frozenset(map(id, counted_elsewhere))
    if not elsewhere <= set(map(id, everything)):
        raise ValueError(
            "counted_elsewhere has a parameter that is none of the model's; pass those of this stage, e.g. "
            "[model.head.weight]"
        )
    device = max(devices, key=lambda device: device.type != "cpu", default=torch.device("cpu"))
    power = Power(norm_type, dtype, device, elsewhere)
    counted = map(power.gradient, parameters.replicated.values())
    total = power.of([gradient for gradient in counted if gradient is not None])
    total = power.add(total, _on_mesh(parameters.on_mesh.values(), power))
    for group, mine in _experts_of_groups(model, parameters).items():
        total = power.add(total, power.over((group,), _on_mesh(mine, power)))
    if stage_group is not None:
        total = power.over((stage_group,), total)
    norm = power.root(total)
    if error_if_nonfinite and not norm.isfinite():
        raise GroupError(
            f"the gradients have norm {norm.item()}, and were left as they are; skip this step, or call without "
            "error_if_nonfinite to have them scaled all the same"
        )
    _scale([local_part(weight.grad) for weight in everything if weight.grad is not None], max_norm, norm)
    return norm


@dataclass(frozen=True, slots=True)
class Power:
    """What is summed for a p-norm: p-th powers. For the largest value: that, and whether there is a NaN, which the
    maximum of a backend may lose. In float64, where squares of large float32 numbers are finite.
    """

    p: float
    dtype: torch.dtype
    device: torch.device
    elsewhere: frozenset[int]  # ids of the parameters that another stage counts

    def gradient(self, weight: nn.Parameter) -> Tensor | None:
        """What counts of a parameter."""
        return None if id(weight) in self.elsewhere else weight.grad

    def of(self, gradients: Iterable[Tensor]) -> Tensor:
        """Of tensors that this rank holds."""
        found = torch.zeros(2 if self.p == math.inf else 1, dtype=torch.float64, device=self.device)
        for some in _by_device(gradient for gradient in gradients if gradient.numel()).values():
            norms = torch._foreach_norm(some, self.p, dtype=self.dtype)  # pyright: ignore[reportPrivateImportUsage]
            norm_G = torch.stack(list(norms)).to(self.device, torch.float64)
            if self.p == math.inf:
                is_nan_G = norm_G.isnan()
                powers = torch.stack((norm_G.masked_fill(is_nan_G, 0.0).amax(), is_nan_G.any().double()))
            else:
                powers = norm_G.pow(self.p).sum().view(1)
            found = self.add(found, powers)
        return found

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Of two sets of tensors."""
        return torch.maximum(a, b) if self.p == math.inf else a + b

    def over(self, groups: Groups, powers: Tensor) -> Tensor:
        """Of what all ranks of the groups hold, one after the other."""
        for group in groups:
            if group.size() > 1:
                powers = within_reach(powers, group)
                op = dist.ReduceOp.MAX if self.p == math.inf else dist.ReduceOp.SUM
                dist.all_reduce(powers, op=op, group=group)
        return powers.to(self.device)

    def root(self, powers: Tensor) -> Tensor:
        """() the norm."""
        if self.p == math.inf:
            return torch.where(powers[1] > 0, math.nan, powers[0]).to(self.dtype)
        return powers[0].pow(1 / self.p).to(self.dtype)


def _on_mesh(weights: Iterable[nn.Parameter], power: Power) -> Tensor:
    """(2,) of whole tensors, from the parts of the ranks of their meshes; of this rank, where there is no mesh."""
    # Keyed by parameters, not by gradients: every rank joins, also one whose gradients are missing.
    gradients_of_groups: dict[Groups, list[Tensor]] = {}
    for weight in weights:
        groups, gradient = (), power.gradient(weight)
        if is_on_mesh(weight):
            mesh, placements = weight.device_mesh, weight.placements
            groups = tuple(mesh.get_group(i) for i, placed in enumerate(placements) if not placed.is_replicate())
            if gradient is not None and is_on_mesh(gradient):  # a sum that is still in parts has no norm
                gradient = cast(Any, gradient).redistribute(placements=placements)
        of_groups = gradients_of_groups.setdefault(groups, [])
        if gradient is not None:
            of_groups.append(local_part(gradient))
    total = power.of([])
    for groups, gradients in gradients_of_groups.items():
        total = power.add(total, power.over(groups, power.of(gradients)))
    return total


def _experts_of_groups(model: nn.Module, parameters: Parameters) -> dict[dist.ProcessGroup, list[nn.Parameter]]:
    """This rank's experts by the group that holds all of them. Layers without experts here have to join, too."""
    found: dict[dist.ProcessGroup, list[nn.Parameter]] = {}
    for layer, _ in expert_layers(model):
        found.setdefault(layer.group, [])
    for name, weight in parameters.experts.items():
        found[parameters.moe_of_expert[name].group].append(weight)
    return found


def _scale(gradients: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for device, some in _by_device(gradients).items():
        torch._foreach_mul_(some, factor.to(device))  # pyright: ignore[reportPrivateImportUsage]


def _by_device(gradients: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        found[gradient.device].append(gradient)
    return found
