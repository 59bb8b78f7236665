"""Whether what every rank should hold alike is alike, bit for bit."""

import ctypes
import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layer.moe import MoE
from ..wire.exchange import check_is_group
from .copies import table_of_experts
from .parameters import Parameters, is_on_mesh, local_part, no_values, tensors_of_experts
from .tables import Table, compare_tables, facts_of

REMEDY = "what every rank holds has to be equal: build it from one seed, load it, or broadcast it"


@torch.no_grad()
def check_replicated(model: nn.Module, *, group: dist.ProcessGroup) -> None:
    """Raise on every rank of ``group`` unless all of them hold the same, bit for bit: names, shapes, dtypes, what is
    frozen, and the values of every parameter and buffer.

    Left out are experts of :class:`MoE` layers and their counts (``load_E``, ``report``), which are each rank's own.
    Of a DTensor that is sharded, shape and placements are compared, and no values. Experts on a mesh have to be the
    same experts on all of its ranks.

    Call it once, when the model was built or loaded. Values are copied to the host one tensor at a time and hashed
    there, at about half a GB a second. One exchange of 64 bytes per pair of ranks; only where they differ, a line per
    name follows.

    Args:
        group: all ranks that hold the model.

    Raises:
        DisagreementError: with the first name that differs, and which ranks hold what.
        RankMistakeError: a parameter without values (on "meta", or lazy), or one whose bytes cannot be read.
    """
    check_is_group(group)
    tensors = dict(_of_every_rank(model))
    problem = next(filter(None, (_unreadable(name, tensor) for name, tensor in tensors.items())), "")
    lines = {} if problem else {name: _line(tensor) for name, tensor in tensors.items()}
    compare_tables(
        [Table(lines=lines), table_of_experts(Parameters.of(model), [group.rank()])],
        problem=problem,
        remedy=REMEDY,
        group=group,
    )


def _of_every_rank(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    own = {id(tensor) for _, tensor in tensors_of_experts(model)}
    for module in model.modules():
        if isinstance(module, MoE):
            own |= {id(module.load_E), id(module.report)}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in own:
            yield name, tensor


def _unreadable(name: str, tensor: Tensor) -> str:
    if problem := no_values(name, tensor):
        return problem
    local = local_part(tensor)
    if local.layout != torch.strided or (local.numel() and not local.data_ptr()):
        kind = type(tensor).__name__
        return f"{name} is a {kind} of {tensor.layout}, whose bytes cannot be read; compare it by hand"
    return ""


def _line(tensor: Tensor) -> str:
    line, local = facts_of(tensor), local_part(tensor)
    if is_on_mesh(tensor):
        line += f", {tuple(tensor.placements)} on a mesh of {tuple(tensor.device_mesh.shape)}"
        if not all(placement.is_replicate() for placement in tensor.placements):
            return line
    return f"{line}, digest {_digest(local)}"


def _digest(tensor: Tensor) -> str:
    """Of its bytes in order, 16 hexadecimal digits. Without numpy, through the address: no copy on the CPU."""
    x = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    found = hashlib.blake2b(digest_size=8)
    if x.numel():
        found.update((ctypes.c_char * x.nbytes).from_address(x.data_ptr()))
    return found.hexdigest()
