"""Copies of what belongs to a process group, which neither a deep copy nor a file can hold."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch.distributed as dist


class InGroup(Protocol):
    group: dist.ProcessGroup


T = TypeVar("T", bound=InGroup)


def copy_in_group(original: T, memo: dict[int, Any]) -> T:
    """For ``__deepcopy__``, of an averaged model or a reference: a copy in the same process group."""
    memo[id(original.group)] = original.group
    copied = type(original).__new__(type(original))
    memo[id(original)] = copied
    copied.__dict__ = deepcopy(original.__dict__, memo)
    return copied


@dataclass(frozen=True, slots=True)
class NotSaved:
    """In place of the group of a module that was loaded from a file."""

    name: str

    def __repr__(self) -> str:
        return f"not in the file that this {self.name} was loaded from (set its attribute .group)"


def state_without_group(module: InGroup) -> dict[str, Any]:
    """For ``__getstate__``, of a module that is saved whole."""
    return {**vars(module), "group": NotSaved(type(module).__name__)}
