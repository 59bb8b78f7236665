"""A state dict with a name for every expert, which torch.distributed.checkpoint saves once and loads anywhere."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..layer.share import ExpertLayer
from ..layout.partition import Partition
from .experts_state import experts_of_state, is_stacked
from .parameters import is_on_mesh, local_part


def split_experts(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """``state`` with each expert under a name of its own: ``moe.experts.gate_eDF``, (e, D, F), becomes
    ``moe.experts.gate_eDF.3``, (D, F), and so on, by the numbers that experts have on all ranks together.

    torch.distributed.checkpoint then saves every expert once, and loads it under any other partition, number of ranks
    or FSDP2 mesh. Tensors are views, so that it loads into those of ``state``::

        dcp.save(split_experts(model.state_dict(), model), checkpoint_id=path)
        dcp.load(split_experts(model.state_dict(), model), checkpoint_id=path)

    No communication. Experts that FSDP2 shards over dimension 0 come as the ordinary tensors of the rank that holds
    them; those that it shards within come as DTensors.

    Args:
        state: ``model.state_dict()``, or that of its optimizer with the same names in it, as
            ``get_optimizer_state_dict`` of torch.distributed.checkpoint.state_dict gives it with
            ``flatten_optimizer_state_dict``. Values that are not stacked over experts stay as they are.
        model: says which names are experts, and which this rank holds.

    Raises:
        ValueError: experts that are not stacked in dimension 0, or that lie on a mesh in two ways at once.
    """
    moe_of_name = experts_of_state(model)
    split: dict[str, Any] = {}
    for name, value in state.items():
        moe = _moe_of(name, moe_of_name)
        if moe is None or not is_stacked(value, moe.partition.sizes[moe.group.rank()]):
            split[name] = value
        else:
            first = moe.partition.offsets[moe.group.rank()]
            split |= {f"{name}.{first + i}": expert for i, expert in _apart(name, value)}
    return split


def _moe_of(name: str, moe_of_name: Mapping[str, ExpertLayer]) -> ExpertLayer | None:
    """The layer of the experts that ``name`` is about; the longest name of them counts."""
    inside = [of_experts for of_experts in moe_of_name if f".{of_experts}." in f".{name}."]
    return moe_of_name[max(inside, key=len)] if inside else None


def _apart(name: str, value_e: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Number among this rank's experts, and what this rank holds of it."""
    local, num_experts = local_part(value_e), value_e.shape[0]
    if not is_on_mesh(value_e):
        yield from enumerate(local.unbind(0))
        return
    mesh, cut = value_e.device_mesh, {i: x for i, x in enumerate(value_e.placements) if not x.is_replicate()}
    over_experts = [i for i, placed in cut.items() if placed.is_shard(0)]
    if len(cut) > len(over_experts) > 0 or len(over_experts) > 1 or not all(x.is_shard() for x in cut.values()):
        raise ValueError(
            f"{name} has placements {tuple(value_e.placements)}; experts can be sharded in dimension 0 over one "
            "dimension of the mesh, or in other dimensions, not both"
        )
    if over_experts:
        (dim,) = over_experts
        first = Partition.chunked(num_experts, mesh.size(dim)).offsets[mesh.get_local_rank(dim)]
        yield from enumerate(local.unbind(0), start=first)
    else:
        yield from _apart_within(value_e, local)


def _apart_within(value_e: Any, local_e: Tensor) -> Iterator[tuple[int, Tensor]]:
    """DTensors of one dimension less, on the same memory."""
    from torch.distributed.tensor import DTensor, Shard  # half a second, and a DTensor has imported it already

    placements = [Shard(placed.dim - 1) if placed.is_shard() else placed for placed in value_e.placements]
    shape, stride = value_e.shape[1:], value_e.stride()[1:]
    for i, local in enumerate(local_e.unbind(0)):
        yield (
            i,
            DTensor.from_local(local, value_e.device_mesh, placements, run_check=False, shape=shape, stride=stride),
        )
