"""The device meshes of a model that is dense and sparse at once."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelMesh:
    """Two views of the same ranks, as torchtitan lays them out.

    Attributes:
        dense: ("dp", "sp", "tp"): data, sequence and tensor parallelism, for everything but the experts.
        expert: ("edp", "ep"): each "ep" row holds all experts once; ranks with the same experts are "edp". An "ep"
            row is consecutive ranks, so it spans "tp" first, then "sp", then "dp".
    """

    dense: DeviceMesh
    expert: DeviceMesh

    @property
    def ep_ranks(self) -> tuple[int, ...]:
        """Global ranks of this rank's "ep" group, in its order, as ``TokenSharding.select`` of the whole mesh
        needs them."""
        return tuple(dist.get_process_group_ranks(self.expert.get_group("ep")))


def build_mesh(*, dp: int = 1, sp: int = 1, tp: int = 1, ep: int = 1, device_type: str) -> ParallelMesh:
    """The meshes over all ranks of the default process group. Collective: every rank calls it.

    Args:
        dp, sp, tp: data, sequence and tensor-parallel sizes; their product is the number of ranks.
        ep: expert-parallel size; it divides that product.
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: an impossible mesh, with one that works. No communication before.
    """
    for name, size in (("dp", dp), ("sp", sp), ("tp", tp), ("ep", ep)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} is {size!r}; it has to be an int of at least 1, and 1 switches it off")
    ranks = dist.get_world_size()
    if dp * sp * tp != ranks:
        inner = sp * tp if ranks % (sp * tp) == 0 else 1
        works = f"dp={ranks // inner}, sp={sp if inner > 1 else 1}, tp={tp if inner > 1 else 1}"
        raise ValueError(
            f"dp={dp} x sp={sp} x tp={tp} is {dp * sp * tp} ranks, but there are {ranks}; the product has to be "
            f"{ranks}, e.g. {works}"
        )
    if ranks % ep:
        divisor = max(size for size in range(1, ep) if ranks % size == 0)
        raise ValueError(
            f"ep={ep} does not divide the {ranks} ranks of dp={dp} x sp={sp} x tp={tp}; use e.g. ep={divisor}"
        )
    return ParallelMesh(
        dense=init_device_mesh(device_type, (dp, sp, tp), mesh_dim_names=("dp", "sp", "tp")),
        expert=init_device_mesh(device_type, (ranks // ep, ep), mesh_dim_names=("edp", "ep")),
    )
