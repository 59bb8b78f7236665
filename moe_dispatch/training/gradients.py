"""The sums of gradients that a training step owes: over all ranks, and over those that hold the same experts."""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..wire.devices import device_of
from ..wire.exchange import check_is_group
from .copies import table_of_experts, with_gradient
from .parameters import Parameters, is_on_mesh
from .summable import why_not_summable
from .tables import Table, compare_tables, facts_of

BUCKET_BYTES = 2**25  # of one all-reduce: enough to fill the wire, little beside the gradients
ALONE_BYTES = 2**22  # from here on two copies cost more than a message: a gradient travels alone, as it lies
REMEDY = (
    "build the model alike on all ranks, freeze the same parameters, and put experts over the ranks that hold the "
    'same ones (build_mesh(...).expert["edp"])'
)


@torch.no_grad()
def sum_gradients(
    model: nn.Module, *, group: dist.ProcessGroup, expert_group: dist.ProcessGroup | None = None
) -> None:
    """Sum gradients over ranks, in place, after backward: once per optimizer step, after the last of its backwards.

    Each rank's loss counts its own tokens. So the gradient of a parameter that every rank holds whole is the sum over
    ``group``. Those of experts are sums over their layer's own group already; they are summed over ``expert_group``.
    DTensors are left alone: FSDP2 has reduced them. Let it sum: ``set_gradient_divide_factor(1.0)`` on each
    ``FSDPModule``, after ``set_force_sum_reduction_for_comms(True)`` on gloo.

    A missing gradient counts as zero where another rank has one; where none has, it stays missing. Gradients travel
    in buckets of one dtype and at most 32 MiB, large ones alone and where they lie; those in low precision as
    float32, so that sums are rounded once. What is frozen costs nothing.

    One exchange of 64 bytes per pair of ranks comes first, so that a difference between ranks is an error and no
    hang. Where the group has no CPU backend, the host waits for it.

    Args:
        model: with any number of :class:`MoE` layers. A part of a model without one (experts by themselves) is
            replicated.
        group: all ranks whose tokens train the model (of a pipeline, this stage).
        expert_group: the ranks that hold the same experts ("edp" of :func:`build_mesh`). Left out where each expert
            lives on one rank, or FSDP2 shards experts over that group.

    Raises:
        RankMistakeError: on every rank of ``group``: groups or meshes that leave ranks out, DistributedDataParallel
            or FSDP1 around a part of the model (they reduce by themselves), FSDP2 that averages, a sparse gradient.
        DisagreementError: on every rank: parameters of other names, shapes, dtypes or ``requires_grad``; ranks that
            hold other experts among those of ``expert_group``, or of a mesh that experts are on.
    """
    for checked in (group, *(() if expert_group is None else (expert_group,))):
        check_is_group(checked)
    parameters = Parameters.of(model)
    experts = {name: weight for name, weight in parameters.experts.items() if not is_on_mesh(weight)}
    replicas = [group.rank()] if expert_group is None else dist.get_process_group_ranks(expert_group)
    same_replicated, same_experts = compare_tables(
        [_table(parameters.replicated), table_of_experts(parameters, replicas)],
        problem=why_not_summable(model, parameters, group, expert_group),
        remedy=REMEDY,
        group=group,
    )
    _sum(list(parameters.replicated.values()), group, same_replicated)
    if expert_group is not None:
        _sum(list(experts.values()), expert_group, same_experts)


def _table(parameters: dict[str, nn.Parameter]) -> Table:
    """Facts that have to be equal; as the note, which of the parameters have a gradient."""
    lines = {name: facts_of(weight) for name, weight in parameters.items()}
    return Table(lines=lines, note=with_gradient(parameters), scope="every rank")


def _sum(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, same_everywhere: bool) -> None:
    """Sum the gradients that any rank of ``group`` has; ``same_everywhere`` if all have the same ones."""
    if group.size() == 1:
        return
    has_P = [weight.grad is not None for weight in parameters]
    if not same_everywhere:
        anywhere_P = torch.tensor(has_P, dtype=torch.uint8, device=device_of(group))
        dist.all_reduce(anywhere_P, op=dist.ReduceOp.MAX, group=group)
        has_P = anywhere_P.tolist()
    gradients: list[Tensor] = []
    for weight, has_gradient in zip(parameters, has_P, strict=True):
        if has_gradient:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            gradients.append(weight.grad)
    room = torch.empty(0, device="cpu")
    for bucket in buckets(gradients):
        room = sum_bucket(bucket, room, group)


def buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients that travel together: of one device and one dtype on the wire, in their order."""
    bucket: list[Tensor] = []
    kind: tuple[object, ...] = ()
    size = 0
    for gradient in sorted(gradients, key=lambda x: (str(x.device), str(on_wire(x)))):
        num_bytes = gradient.numel() * on_wire(gradient).itemsize
        of_gradient = (gradient.device, on_wire(gradient))
        if num_bytes >= ALONE_BYTES:
            yield [gradient]
            continue
        if bucket and (of_gradient != kind or size + num_bytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        kind, size = of_gradient, size + num_bytes
    if bucket:
        yield bucket


def on_wire(gradient: Tensor) -> torch.dtype:
    """What it travels as: a sum over ranks in low precision would be rounded at every step."""
    return torch.promote_types(gradient.dtype, torch.float32)


def sum_bucket(bucket: Sequence[Tensor], room: Tensor, group: dist.ProcessGroup) -> Tensor:
    """One all-reduce; in place where a gradient is alone and can be sent as it lies. ``room`` is where the last
    bucket travelled, and the result where this one did: new memory for each took longer on the CPU than copies."""
    first, dtype, sizes = bucket[0], on_wire(bucket[0]), [gradient.numel() for gradient in bucket]
    if len(bucket) == 1 and first.is_contiguous() and first.dtype == dtype:
        dist.all_reduce(first, group=group)
        return room
    if (room.dtype, room.device) != (dtype, first.device) or room.numel() < sum(sizes):
        room = torch.empty(sum(sizes), dtype=dtype, device=first.device)
    flat = room[: sum(sizes)]
    torch.cat([gradient.flatten().to(dtype) for gradient in bucket], out=flat)
    dist.all_reduce(flat, group=group)
    for gradient, part in zip(bucket, flat.split(sizes), strict=True):
        gradient.copy_(part.view(gradient.shape))
    return room
