"""Count what a call would cost a device: collectives, bytes to other ranks, and waits of the host for the device.

On the CPU nothing waits, so a host sync is counted where the same line would be one on CUDA: where a value of a
tensor decides what Python does, or how large a tensor is. What was copied to the host once (``.cpu()``) is read for
nothing from then on, and so is what is computed from it.

Not seen: ``x.to(device)`` with a ``torch.device``, which code for any device writes too.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Methods that never reach a kernel on the CPU; the rest is seen as operations.
TO_HOST = frozenset({"cpu", "tolist", "numpy", "__array__"})
SYNC_OPERATIONS = frozenset(
    {
        "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero",
        "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    }
)  # fmt: skip
# Receives are the other ends of the sends of peers, who count them.
SEND_NOTHING = ("wait_tensor", "wrap_tensor_autograd", "c10d::recv")
INDEXED_BY_MASK = frozenset({"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})


@dataclass
class Counts:
    """What one pass did on this rank.

    Attributes:
        collectives: names of the operations on a process group, in order; sends, too, but no receives.
        wire_bytes: bytes handed to them for other ranks.
        host_syncs: what the host would have waited for, in order.
    """

    collectives: list[str] = field(default_factory=list)
    wire_bytes: int = 0
    host_syncs: list[str] = field(default_factory=list)


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what the block does. Backward has to be started with :func:`run_backward` to be seen whole."""
    counts = Counts()
    functions = _Functions(counts)
    with _Operations(counts, functions), functions:
        yield counts


def run_backward(out: Tensor, grad_out: Tensor) -> None:
    """``out.backward(grad_out)``, with torch's function modes left on inside: a tensor as the argument would be
    a call for the mode itself, which is off while it runs."""
    torch.autograd.backward(torch.autograd.graph.get_gradient_edge(out), grad_out)


class _Functions(TorchFunctionMode):
    """Sees ``.cpu()`` and ``.tolist()``, and follows what is on the host."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts
        self.is_host_call = False
        self._on_host: dict[int, Tensor] = {}  # by id; held, so that no other tensor gets that id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = getattr(func, "__name__", "")
        if tensors and all(id(x) in self._on_host for x in tensors):
            return self._call_on_host(func, args, kwargs)
        if name in TO_HOST or (name == "to" and "cpu" in (*args[1:2], kwargs.get("device"))):
            self.counts.host_syncs.append(name)
            return self._call_on_host(func, args, kwargs)
        return func(*args, **kwargs)

    def _call_on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        before, self.is_host_call = self.is_host_call, True
        try:
            result = func(*args, **kwargs)
        finally:
            self.is_host_call = before
        if isinstance(result, Tensor):
            # .cpu() of a CPU tensor is that tensor, which as such may still be read for the first time
            return self._keep(result.view_as(result) if any(result is x for x in args) else result)
        if isinstance(result, tuple | list):
            for x in result:
                if isinstance(x, Tensor):
                    self._keep(x)
        return result

    def _keep(self, x: Tensor) -> Tensor:
        self._on_host[id(x)] = x
        return x


class _Operations(TorchDispatchMode):
    """Sees every kernel, and every collective, also in backward."""

    def __init__(self, counts: Counts, functions: _Functions) -> None:
        super().__init__()
        self.counts, self.functions = counts, functions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "c10d" in func.namespace:
            if not name.startswith(SEND_NOTHING) and not name.endswith(SEND_NOTHING):
                self.counts.collectives.append(name)
                self.counts.wire_bytes += bytes_to_others(name, args)
        elif not self.functions.is_host_call and _waits(name, args, kwargs or {}):
            self.counts.host_syncs.append(name)
        return func(*args, **kwargs or {})


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    if name in SYNC_OPERATIONS:
        return True
    if name == "aten::repeat_interleave.Tensor":
        return kwargs.get("output_size") is None
    if name in INDEXED_BY_MASK:
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return False


def bytes_to_others(name: str, args: Any) -> int:
    """Bytes that this rank hands to a collective for ranks other than itself.

    For a collective that is not an all-to-all: the traffic of a ring, of all ranks.
    """
    if name == "c10d::alltoall_base_":
        group = dist.ProcessGroup.unbox(args[2])
        return _split_to_others(args[1], args[4], group.rank(), group.size())
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if name == "_c10d_functional::all_to_all_single":
        return _split_to_others(args[0], args[2], rank, ranks)
    if name == "c10d::alltoall_":
        return _num_bytes(x for to, x in enumerate(args[1]) if to != rank)
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    largest = max((_num_bytes([x]) for x in tensors), default=0)
    if "allgather" in name or "all_gather" in name or "reduce_scatter" in name:
        return largest * (ranks - 1) // ranks if "base" in name or "reduce_scatter" in name else largest * (ranks - 1)
    if "allreduce" in name or "all_reduce" in name:
        return 2 * largest * (ranks - 1) // ranks
    return largest


def _split_to_others(rows: Tensor, splits: list[int], rank: int, ranks: int) -> int:
    num_rows = rows.shape[0]
    to_self = splits[rank] if splits else num_rows // ranks
    return _num_bytes([rows]) * (num_rows - to_self) // max(num_rows, 1)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)
