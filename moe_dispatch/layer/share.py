"""Which module of a model holds experts of a layer that is spread over ranks: MoE's, and others that carry a mark."""

from collections.abc import Iterator
from typing import Any, Protocol, Self

import torch.distributed as dist
from torch import nn

from ..layout.partition import Partition
from ..wire.group_copy import copy_in_group, state_without_group
from .moe import MoE

MARK = "experts_of_ranks"


class ExpertLayer(Protocol):
    """What a training step has to know of a layer: who of ``group`` holds which experts."""

    partition: Partition
    group: dist.ProcessGroup


class ExpertShare:
    """The mark of a module whose parameters and buffers are this rank's experts, one entry each in dimension 0, as
    its attribute ``experts_of_ranks``: sums, norms and state dicts take it for what an :class:`MoE` has in
    ``experts``."""

    def __init__(self, partition: Partition, group: dist.ProcessGroup) -> None:
        self.partition, self.group = partition, group

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """In the same process group."""
        return copy_in_group(self, memo)

    def __getstate__(self) -> dict[str, Any]:
        """Without the group, for ``torch.save(module)``."""
        return state_without_group(self)


def expert_layers(model: nn.Module) -> Iterator[tuple[ExpertLayer, nn.Module]]:
    """Each layer of experts in the model, and the module that holds this rank's."""
    for module in model.modules():
        if isinstance(module, MoE):
            yield module, module.experts
        elif isinstance(share := vars(module).get(MARK), ExpertShare):
            yield share, module
