"""Ranks as threads, each with a device that is not there."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from moe_dispatch.testing import RankThreads, RankTimeout
from moe_dispatch.testing.thread_group import Rooms
from moe_dispatch.testing.turns import Turns

from . import attention
from .device import CUDA, FakeGpu, Schedule, pinned
from .group import BACKEND, CudaGroup

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ended(Generic[T]):
    """How a rank ended: by what it returned, or by what it raised."""

    result: T | None = None
    error: Exception | None = None


def results_on_cuda(case: Callable[[int, FakeGpu], T], ranks: int, schedule: Schedule = "at start") -> list[T]:
    """What each rank returns. The first exception of a rank is raised."""
    ended = ends_on_cuda(case, ranks, schedule)
    for each in ended:
        if each.error is not None:
            raise each.error
    return [each.result for each in ended]  # type: ignore[misc]


def ends_on_cuda(
    case: Callable[[int, FakeGpu], T],
    ranks: int,
    schedule: Schedule = "at start",
    capability: tuple[int, int] = (9, 0),
) -> list[Ended[T]]:
    """Run ``case(rank, gpu)`` on ranks that are threads.

    Raises:
        AssertionError: a rank waits for its peers, of which some have left: NCCL would never return.
    """
    ended: dict[int, Ended[T]] = {}

    def on_rank(rank: int) -> None:
        group = dist.group.WORLD
        assert isinstance(group, CudaGroup)
        with group.gpu:
            try:
                ended[rank] = Ended(result=case(rank, group.gpu))
            except Exception as error:
                ended[rank] = Ended(error=error)

    with cuda_is_there(capability), CudaThreads(schedule) as threads:
        try:
            threads.run(on_rank, ranks)
        except RankTimeout as error:
            waiting = sorted(set(range(ranks)) - set(ended))
            left = "; ".join(f"rank {rank}: {end.error!r}" for rank, end in sorted(ended.items()))
            raise AssertionError(f"ranks {waiting} wait for their peers, of which some left ({left})") from error
    return [ended[rank] for rank in range(ranks)]


def current_gpu() -> FakeGpu:
    """The device of the calling rank."""
    return next(mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, FakeGpu))


class CudaEvent:
    """An event after all that was enqueued so far."""

    def record(self, stream: Any = None) -> None:
        self._gpu = current_gpu()

    def synchronize(self) -> None:
        self._gpu.wait()
        self._gpu.arrive()


class CudaThreads(RankThreads):
    """Ranks whose groups are :class:`CudaGroup`."""

    backend = BACKEND

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self._schedule: Schedule = schedule

    def _group_of(self, rank: int, ranks: int, turns: Turns, rooms: Rooms) -> CudaGroup:
        return CudaGroup("0", range(ranks), rank, turns, rooms, FakeGpu(self._schedule))


@contextmanager
def cuda_is_there(capability: tuple[int, int]) -> Iterator[None]:
    """What the process says of its devices."""
    patches: dict[tuple[Any, str], Any] = {
        (torch.cuda, "_lazy_init"): lambda: None,
        (torch.cuda, "get_device_capability"): lambda device=None: capability,
        (torch.cuda, "Event"): CudaEvent,
        (torch.cuda, "current_stream"): lambda device=None: current_gpu().stream,
        (torch.cuda, "is_current_stream_capturing"): lambda: current_gpu().stream.is_capturing,
        (torch.Tensor, "pin_memory"): lambda x: pinned(x.clone()),
        (torch.accelerator, "current_accelerator"): lambda check_available=False: CUDA,
        (F, "scaled_dot_product_attention"): attention.scaled_dot_product_attention,
    }
    with ExitStack() as stack:
        for (where, name), value in patches.items():
            stack.enter_context(mock.patch.object(where, name, value))
        yield
