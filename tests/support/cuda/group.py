# pyright: reportIncompatibleMethodOverride=false
"""Process groups with NCCL's rules, of ranks that are threads: tensors of the device only, of its dtypes, dense; each
collective at one of two extreme times."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from moe_dispatch.testing.meeting import ThreadWork
from moe_dispatch.testing.thread_group import Rooms, ThreadGroup
from moe_dispatch.testing.turns import Turns

from .device import CudaTensor, FakeGpu
from .report import line

BACKEND = "cuda:nccl"
NCCL_DTYPES = frozenset(
    {
        torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
        torch.float64,
    }
)  # fmt: skip
Join = Callable[[list[Tensor], list[Tensor]], ThreadWork]


class CudaGroup(ThreadGroup):
    """One rank's view of a group. ``gpu`` is its device."""

    def __init__(self, name: str, ranks: Sequence[int], rank: int, turns: Turns, rooms: Rooms, gpu: FakeGpu) -> None:
        super().__init__(name, ranks, rank, turns, rooms)
        self.gpu = gpu
        self.in_flight: list[CudaWork] = []  # in the order of the group's stream

    def new_group(self, ranks: Sequence[int], *, group_name: str, **_: Any) -> "CudaGroup | None":
        rank = self._ranks[self.rank()]
        if rank not in ranks:
            return None
        return CudaGroup(group_name, ranks, rank, self._turns, self._rooms, self.gpu)

    def all_to_all_single(
        self, out: Tensor, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], opts: Any = None
    ) -> "CudaWork":
        join = super().all_to_all_single
        return self._begin(
            "all_to_all", [out], [x], lambda outs, xs: join(outs[0], xs[0], out_splits, in_splits, opts)
        )

    def allgather(self, outs: list[list[Tensor]], xs: list[Tensor], opts: Any = None) -> "CudaWork":
        join = super().allgather
        return self._begin("all_gather", outs[0], xs, lambda outs, xs: join([outs], xs, opts))

    def all_gather_single(self, out: Tensor, x: Tensor, opts: Any = None) -> "CudaWork":
        join = super().all_gather_single
        return self._begin("all_gather", [out], [x], lambda outs, xs: join(outs[0], xs[0], opts))

    def allreduce(self, xs: list[Tensor], opts: Any) -> "CudaWork":
        join = super().allreduce
        return self._begin("all_reduce", xs, [], lambda outs, _: join(outs, opts))

    def _begin(self, name: str, outs: list[Tensor], xs: list[Tensor], join: Join) -> "CudaWork":
        for x in (*outs, *xs):
            _check_for_nccl(name, x)
        self.gpu.collective(name)
        work = CudaWork(self, name, [_Memory(x) for x in outs], [_Memory(x) for x in xs], join)
        self.in_flight.append(work)
        if self.gpu.schedule == "at start":
            work.run()
        return work

    def _exchange(self, facts: str, sources: Sequence[Tensor], *args: Any) -> ThreadWork:
        if any(isinstance(x, CudaTensor) for x in sources):
            raise RuntimeError(f"{facts} on a device that is not there; add it to CudaGroup")
        return super()._exchange(facts, sources, *args)


class CudaWork(dist.Work):
    """A collective on its way. Who started it keeps its tensors, and leaves them alone, until ``wait()``."""

    def __init__(self, group: CudaGroup, name: str, outs: list["_Memory"], xs: list["_Memory"], join: Join) -> None:
        super().__init__()
        self._group, self._outs, self._xs, self._join = group, outs, xs, join
        self._told = f"the {name} that was started at {line()}"
        self._sent = [memory.tensor(self._told).clone() for memory in xs]

    def run(self) -> None:
        """Move the bytes: those of earlier collectives of the group first, as its stream does."""
        while self in self._group.in_flight:
            self._group.in_flight[0]._move()

    @torch.no_grad()
    def _move(self) -> None:
        self._group.in_flight.remove(self)
        with _disable_current_modes():
            outs, xs = ([memory.tensor(self._told).clone() for memory in way] for way in (self._outs, self._xs))
            self._join(outs, xs).wait()
            for memory, out in zip(self._outs, outs, strict=True):
                memory.tensor(self._told).copy_(out)

    def wait(self, timeout: Any = None) -> bool:
        self.run()
        with _disable_current_modes():
            for memory in self._outs:
                memory.tensor(self._told)
            for memory, sent in zip(self._xs, self._sent, strict=True):
                if not memory.tensor(self._told).view(-1).view(torch.uint8).equal(sent.view(-1).view(torch.uint8)):
                    raise RuntimeError(f"what is sent was written to before wait(), in {self._told}")
        return True


class _Memory:
    """Memory that a collective works in, and that only its caller keeps."""

    def __init__(self, x: Tensor) -> None:
        host = x.host if isinstance(x, CudaTensor) else x
        self._storage = StorageWeakRef(host.untyped_storage())
        self._dtype, self._offset = host.dtype, host.storage_offset()
        self._size, self._strides = host.size(), host.stride()

    def tensor(self, told: str) -> Tensor:
        """The tensor. RuntimeError where its memory was freed."""
        if not self._size.numel():
            return torch.empty(self._size, dtype=self._dtype, device="cpu")
        if self._storage.expired():
            raise RuntimeError(f"memory was freed before wait(), in {told}")
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)  # type: ignore[attr-defined]
        return torch.empty(0, dtype=self._dtype, device="cpu").set_(storage, self._offset, self._size, self._strides)


def _check_for_nccl(name: str, x: Tensor) -> None:
    if not isinstance(x, CudaTensor):
        raise RuntimeError(f"No backend type associated with device type cpu: {name} at {line()}")
    if x.dtype not in NCCL_DTYPES:
        raise RuntimeError(f"Input tensor data type is not supported for NCCL process group: {x.dtype} at {line()}")
    if not x.host.is_contiguous():
        raise RuntimeError(f"Tensors must be contiguous: {name} at {line()}")
