"""What a layer needs of a plan and of what makes it: the counted, the static and the hierarchical kind alike."""

from typing import NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.partition import Partition
from .hierarchical import HierarchicalPlan
from .metadata import DispatchMetadata
from .terms import Terms

Plan = DispatchMetadata | HierarchicalPlan  # a StaticPlan is a DispatchMetadata


class Planner(Protocol):
    """Makes the plans of a layer: :class:`Counted`, :class:`StaticSizes` or :class:`NodeGroups`."""

    def check_group(self, experts: Partition, group: dist.ProcessGroup) -> None:
        """ValueError unless it can plan over ``group``. Called once, when the layer is made."""
        ...

    def plan(self, expert_BlK: Tensor, weight_BlK: Tensor | None, terms: Terms, group: dist.ProcessGroup) -> Plan:
        """Which rows go where. Every rank of the group calls it, or :meth:`refuse`.

        Args:
            expert_BlK: ids, -1 for no expert.
            weight_BlK: the weight of each choice, to check for NaN.
            terms: what the ranks have to agree about.
        """
        ...

    def refuse(
        self, problem: str, terms: Terms, group: dist.ProcessGroup, *, num_choices: int, device: torch.device
    ) -> NoReturn:
        """For a rank that finds, before it has ids, that it cannot go on: tell the peers, who are in :meth:`plan`."""
        ...

    def new_report(self, ranks: int) -> Tensor:
        """What ``plan.add_report`` adds to: the report of several plans, before the first."""
        ...

    def check_report(self, report: Tensor) -> None:
        """Raise, the same on every rank, where the report tells of a problem."""
        ...
