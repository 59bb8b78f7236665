"""What ranks say of experts that they hold copies or shards of: they have to be the same experts.

Ranks number themselves twice: in a mesh by their coordinates, in a process group in ascending order. Where a mesh has
its ranks in another order, a column of it may hold the experts of several places of the layer's group.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from ..layer.share import ExpertLayer
from .parameters import Parameters, is_on_mesh
from .tables import Table, facts_of


def table_of_experts(parameters: Parameters, ranks: Sequence[int]) -> Table:
    """The experts of this rank that it holds together with ``ranks``; where it is the only one, with those of the
    first mesh that experts are on."""
    ranks_of = {
        name: weight.device_mesh.mesh.flatten().tolist() if is_on_mesh(weight) else ranks
        for name, weight in parameters.experts.items()
    }
    if len(ranks) == 1:
        ranks = next(filter(lambda others: len(others) > 1, ranks_of.values()), ranks)
    lines = {
        name: f"{facts_of(weight)}, {_which(parameters.moe_of_expert[name])}"
        for name, weight in parameters.experts.items()
        if set(ranks_of[name]) == set(ranks)
    }
    return Table(lines=lines, note=with_gradient(parameters.experts), scope=f"experts of {sorted(ranks)}")


def with_gradient(parameters: Mapping[str, nn.Parameter]) -> str:
    """Which of them have one."""
    return "".join("01"[weight.grad is not None] for weight in parameters.values())


def _which(moe: ExpertLayer) -> str:
    rank = moe.group.rank()
    first = moe.partition.offsets[rank]
    return f"experts {first} to {first + moe.partition.sizes[rank] - 1}"
