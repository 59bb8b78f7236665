"""Where a group communicates, and what of a call lies elsewhere."""

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def device_of(group: dist.ProcessGroup) -> torch.device:
    """One that ``group`` communicates on; the CPU where it can, so that nothing waits for the device."""
    backend = dist.get_backend(group)
    accelerator = torch.accelerator.current_accelerator()
    on_cpu = backend in ("gloo", "mpi") or "cpu:" in backend
    return torch.device("cpu") if on_cpu or accelerator is None else accelerator


def carries(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether tensors of ``device`` can travel in ``group``. True where nobody can say: a group of one rank sends
    nothing, compiled code has no groups, and of one that is not torch's nothing is known."""
    if torch.compiler.is_compiling() or group.size() == 1:
        return True
    config = _config(group)
    return not config or f"{device.type}:" in config


def device_for(tensors: Iterable[object], group: dist.ProcessGroup) -> torch.device:
    """Where the peers expect this rank's part in an exchange: on the device of most of these, as far as they are
    tensors that can travel; else where tensors of such a group are."""
    devices = [x.device for x in tensors if isinstance(x, Tensor) and not x.is_meta and carries(group, x.device)]
    if devices:
        return most(devices)
    accelerator, backends = torch.accelerator.current_accelerator(), _backends(group)
    # One backend for both is gloo: its tensors are on the CPU, and it takes others too.
    if accelerator is None or backends.get(accelerator.type) == backends.get("cpu"):
        return device_of(group)
    return accelerator


def problem_of_devices(group: dist.ProcessGroup, **tensors: object) -> str:
    """What is wrong where one of them, by the name of its argument, is where the group does not communicate, or not
    where the first is; empty where nothing is. What is no tensor is left out."""
    there = {name: x.device for name, x in tensors.items() if isinstance(x, Tensor)}
    if not there:
        return ""
    first, wanted = next(iter(there.items()))
    if not carries(group, wanted):
        return f"{first} is on {wanted}, but the group communicates on {device_for([], group)}; move it there"
    for name, device in there.items():
        if device != wanted:
            return f"{name} is on {device}, but {first} on {wanted}; move it there"
    return ""


def most(values: list[T]) -> T:
    """The value that most are; the first of them where several are as many."""
    return max(values, key=values.count)


def _backends(group: dist.ProcessGroup) -> dict[str, str]:
    """By the kind of device."""
    return dict(pair.split(":")[:2] for pair in _config(group).split(",") if pair)


def _config(group: dist.ProcessGroup) -> str:
    """As torch writes it, "cpu:gloo,cuda:nccl"; empty for a group that torch.distributed did not make."""
    try:
        return dist.get_backend_config(group)
    except (TypeError, ValueError):
        return ""
