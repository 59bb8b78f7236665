"""Deep copies of what belongs to a process group, which cannot be copied: an averaged model, a reference."""

from copy import deepcopy
from typing import Any, Protocol, TypeVar

import torch.distributed as dist


class InGroup(Protocol):
    group: dist.ProcessGroup


T = TypeVar("T", bound=InGroup)


def copy_in_group(original: T, memo: dict[int, Any]) -> T:
    """For ``__deepcopy__``: a copy in the same process group."""
    memo[id(original.group)] = original.group
    copied = type(original).__new__(type(original))
    memo[id(original)] = copied
    copied.__dict__ = deepcopy(original.__dict__, memo)
    return copied
