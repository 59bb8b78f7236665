"""From the state dicts of ranks to that of one process with the whole model, and back."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layer.share import ExpertLayer, expert_layers
from ..wire.devices import device_of
from ..wire.exchange import exchange_rows
from .experts_state import experts_of_state
from .parameters import is_on_mesh, no_values, within_reach
from .tables import Table, compare_tables, from_every_rank


@torch.no_grad()
def whole_state_dict(model: nn.Module, *, keep: bool = True) -> dict[str, Any]:
    """The state dict of the model of one process: experts of all ranks in the order of their layer's partition, and
    DTensors whole. Every rank of the model calls it.

    Args:
        keep: whether this rank wants it. Ranks that do not still help, and get ``{}``: with ``keep=rank == 0`` the
            model is once in the host memory of one rank, and experts travel to that rank only. One tensor at a time
            is whole on the device.

    Returns:
        Copies on the CPU, by the names of ``model.state_dict()``. A value that is no tensor is that of this rank.

    Raises:
        GroupError: on every rank of a layer's group: experts that are not stacked in dimension 0, or of other widths
            or dtypes than on a peer, and parameters without values.
    """
    state, moe_of_name, problem = model.state_dict(), dict[str, ExpertLayer](), ""
    try:
        moe_of_name = experts_of_state(model)
    except ValueError as error:  # not on every rank, where a number of experts is a width by chance
        problem = str(error)
    problem = problem or _without_values(state)
    groups = dict.fromkeys(layer.group for layer, _ in expert_layers(model))
    keeps_of_group = {group: _check(state, moe_of_name, problem, group, keep) for group in groups}
    whole: dict[str, Any] = {}
    for name, value in state.items():
        if is_on_mesh(value):
            value = _full(value)
        if name in moe_of_name:
            value = _gather(value, moe_of_name[name], keeps_of_group[moe_of_name[name].group])
        if keep:
            whole[name] = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
    return whole


def share_of_state_dict(whole: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """What ``model.load_state_dict`` takes on this rank of the state dict of the whole model: its experts by its
    layer's partition, and its part of each DTensor. No communication; every rank has ``whole``, e.g. from
    ``torch.load(path, mmap=True)``.

    Other names and missing ones are left for ``load_state_dict`` to tell. A model on "meta" takes it with
    ``assign=True``; tensors then are where ``whole`` has them, DTensors on the device of their mesh.

    Args:
        whole: as :func:`whole_state_dict` gives it, or of one process, e.g. of
            :class:`moe_dispatch.reference.ReferenceMoE`.
        model: its names, partitions and meshes; its values are not read.

    Returns:
        Experts are copies, so that ``whole`` can be freed. The rest is not copied.

    Raises:
        ValueError: another number of experts in ``whole``, or experts of the model that are not stacked in
            dimension 0. Every rank sees the first by itself.
    """
    state, moe_of_name = model.state_dict(), experts_of_state(model)
    share: dict[str, Any] = {}
    for name, value in whole.items():
        moe = moe_of_name.get(name)
        if moe is not None:
            value = _cut(name, value, moe)
        mine = state.get(name)
        share[name] = _distributed_as(mine, value) if is_on_mesh(mine) and not is_on_mesh(value) else value
    return share


# ---- from all ranks --------------------------------------------------------------------------------------


def _full(on_mesh: Any) -> Tensor:
    """A collective of its mesh. Not for what has no elements: where a rank has no experts, FSDP2 around the whole
    model lays them on a mesh of ranks that have some, which have them elsewhere."""
    if not on_mesh.numel():
        return torch.empty(on_mesh.shape, dtype=on_mesh.dtype, device=on_mesh.device)
    return on_mesh.full_tensor()


def _without_values(state: Mapping[str, Any]) -> str:
    tensors = ((name, value) for name, value in state.items() if isinstance(value, Tensor))
    return next(filter(None, (no_values(name, tensor) for name, tensor in tensors)), "")


def _check(
    state: Mapping[str, Any],
    moe_of_name: Mapping[str, ExpertLayer],
    problem: str,
    group: dist.ProcessGroup,
    keep: bool,
) -> list[bool]:
    """Which ranks of ``group`` keep the result. Raise on all of them unless their experts fit together."""
    names = [name for name, moe in moe_of_name.items() if moe.group is group]
    lines = {name: f"experts of {tuple(state[name].shape[1:])} of {state[name].dtype}" for name in names}
    remedy = "build experts of one width and dtype on all ranks"
    compare_tables([Table(lines=lines)], problem=problem, remedy=remedy, group=group)
    ones = [1] * group.size()
    return [
        bool(said) for said in from_every_rank(torch.tensor([int(keep)], device="cpu"), ones, device_of(group), group)
    ]


def _gather(x_e: Tensor, moe: ExpertLayer, keeps: Sequence[bool]) -> Tensor:
    """(e, ...) of every rank -> (E, ...) on the ranks that keep it, nothing on the others. As bytes: backends do not
    know every dtype."""
    mine, inner = len(x_e), x_e.shape[1:]
    keeps_it = keeps[moe.group.rank()]
    if not prod(inner):
        return x_e.new_empty(moe.partition.total, *inner)
    bytes_eN = within_reach(x_e, moe.group).reshape(mine, prod(inner)).contiguous().view(torch.uint8)
    received = exchange_rows(
        bytes_eN.repeat(sum(keeps), 1),
        [mine * kept for kept in keeps],
        [size * keeps_it for size in moe.partition.sizes],
        moe.group,
    )
    return received.view(x_e.dtype).reshape(len(received), *inner)


# ---- to one rank -----------------------------------------------------------------------------------------


def _cut(name: str, value_E: Tensor, moe: ExpertLayer) -> Tensor:
    partition, rank = moe.partition, moe.group.rank()
    if not value_E.ndim or value_E.shape[0] != partition.total:
        raise ValueError(
            f"{name} is {tuple(value_E.shape)} in the state dict of the whole model, but its layer has "
            f"{partition.total} experts in {partition}; it has to have that many in dimension 0"
        )
    return value_E.narrow(0, partition.offsets[rank], partition.sizes[rank]).clone()


def _distributed_as(on_mesh: Any, value: Tensor) -> Tensor:
    """As a DTensor like the other one; each rank cuts its own part."""
    from torch.distributed.tensor import distribute_tensor  # half a second, and a DTensor has imported it already

    return distribute_tensor(value, on_mesh.device_mesh, on_mesh.placements, src_data_rank=None)
