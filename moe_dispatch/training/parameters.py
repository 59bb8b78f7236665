"""Which parameters are experts of this rank, which every rank holds whole, and which lie on a mesh."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parameter import is_lazy

from ..layer.share import ExpertLayer, expert_layers
from ..wire.devices import device_of
from ..wire.local_tensors import is_dtensor


class Placement(Protocol):
    """How a DTensor lies on one dimension of its mesh."""

    def is_shard(self, dim: int | None = None) -> bool: ...

    def is_replicate(self) -> bool: ...

    def is_partial(self) -> bool: ...


class OnMesh(Protocol):
    """What we use of a DTensor."""

    device_mesh: DeviceMesh
    placements: Sequence[Placement]


def is_on_mesh(x: object) -> TypeGuard[OnMesh]:
    """Is it a DTensor?"""
    return is_dtensor(x)


def local_part(x: Tensor) -> Tensor:
    """What this rank holds of it."""
    return x.to_local() if is_on_mesh(x) else x  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """The parameters of a model, each in one place, by name.

    Attributes:
        replicated: ordinary tensors that every rank holds whole.
        on_mesh: DTensors that are no experts: FSDP2 or DTensor sums their gradients.
        experts: those of layers of experts (see ``layer/share.py``) that have elements, ordinary or DTensors.
        moe_of_expert: the layer that each of ``experts`` belongs to.
    """

    replicated: dict[str, nn.Parameter]
    on_mesh: dict[str, nn.Parameter]
    experts: dict[str, nn.Parameter]
    moe_of_expert: dict[str, ExpertLayer]

    @classmethod
    def of(cls, model: nn.Module) -> "Parameters":
        moe_of_tensor = {id(tensor): moe for moe, tensor in tensors_of_experts(model)}
        found = cls(replicated={}, on_mesh={}, experts={}, moe_of_expert={})
        for name, parameter in model.named_parameters():
            moe = moe_of_tensor.get(id(parameter))
            if moe is None:
                (found.on_mesh if is_on_mesh(parameter) else found.replicated)[name] = parameter
            elif parameter.numel():
                found.experts[name], found.moe_of_expert[name] = parameter, moe
        return found


def tensors_of_experts(model: nn.Module) -> Iterator[tuple[ExpertLayer, Tensor]]:
    """Every parameter and buffer of the experts of every layer."""
    for layer, experts in expert_layers(model):
        for tensor in (*experts.parameters(), *experts.buffers()):
            yield layer, tensor


def wrapped_by(wrapper: str, model: nn.Module) -> str:
    """Where in the model there is a module of that class; empty if nowhere."""
    for place, module in model.named_modules():
        if any(kind.__name__ == wrapper for kind in type(module).__mro__):
            return place or "the model"
    return ""


def no_values(name: str, tensor: Tensor) -> str:
    """What is wrong with a tensor on "meta", or one that a lazy module will make; empty if nothing is."""
    if not (is_lazy(tensor) or tensor.is_meta):
        return ""
    return (
        f"{name} has no values yet; give the model its values first, e.g. on meta to_empty(device=...) and "
        "reset_parameters(), or load_state_dict(..., assign=True)"
    )


def within_reach(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x`` where ``group`` can send it from: what was offloaded to the CPU may have to move."""
    return x.to(device_of(group)) if x.device.type == "cpu" else x
