"""What a forward keeps for its backward, and the most memory that a call needs at once."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch.lab.bench import memory
from moe_dispatch.lab.bench.contenders.named import contenders_of
from moe_dispatch.lab.bench.measure import Run, account
from moe_dispatch.lab.bench.memory import bytes_kept, peak_bytes
from moe_dispatch.lab.bench.workloads.dispatch import DispatchWorkload
from moe_dispatch.testing import RankPool
from tests.support.lab.bench_workloads import ROUTED


@pytest.fixture(autouse=True)
def _frozen() -> Iterator[None]:
    """What other tests left in this process need not be looked at, as in :func:`measure`."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class KeepsOnTheContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mine = (torch.zeros(100), x)  # not through save_for_backward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@pytest.mark.parametrize(
    ("forward", "kept"),
    [
        (lambda x: x * 2, 0),
        (lambda x: x.exp(), 0),  # it keeps its output, which the caller has
        (lambda x: x.exp() * 2, 40),
        (lambda x: (y := x.exp())[:5] * y[5:], 40),  # one storage, kept three times
        (lambda x: KeepsOnTheContext.apply(x), 400),
    ],
)
def test_bytes_kept_are_unique_storages_of_nodes_and_contexts(forward: Callable[[Tensor], Tensor], kept: int) -> None:
    x = torch.ones(10, requires_grad=True)
    assert bytes_kept(lambda: forward(x), lambda: [x]) == kept


def test_bytes_that_are_held_for_a_moment_only_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Tensor] = []  # as gloo's thread holds the buffers of its last collective
    monkeypatch.setattr(memory.time, "sleep", lambda _: held.clear())

    def forward() -> Tensor:
        held.append(torch.zeros(100))
        return torch.ones(1)

    assert bytes_kept(forward, list) == 0


def test_bytes_that_a_busy_thread_holds_are_not_kept() -> None:
    """It is given the time that it needs to let go, however long that is on this machine."""
    started, held = threading.Event(), [torch.zeros(100)]

    def hold() -> None:
        started.set()
        end = time.thread_time() + 0.2  # of work, not of waiting for a core
        while time.thread_time() < end:
            pass
        held.clear()

    thread = threading.Thread(target=hold)

    def forward() -> Tensor:
        held[:] = [torch.zeros(100)]
        thread.start()
        started.wait()
        return torch.ones(1)

    assert bytes_kept(forward, list) == 0
    thread.join()


def test_the_peak_is_what_a_call_needs_at_once() -> None:
    size = 64 * 2**20
    peak = peak_bytes(lambda: torch.zeros(size, dtype=torch.uint8).fill_(1))
    assert peak is not None
    assert 0.9 * size < peak < 1.5 * size
    assert (peak_bytes(lambda: None) or 0) < 0.1 * size  # what was freed is no longer there


def test_pages_that_were_freed_before_a_call_count_when_it_takes_them_again() -> None:
    size, number = 16 * 2**10, 2048  # small enough to come from the heap, and for torch to fill with one thread

    def blocks() -> list[Tensor]:
        return [torch.zeros(size, dtype=torch.uint8).fill_(1) for _ in range(number)]

    freed, above = blocks(), torch.ones(size, dtype=torch.uint8)  # the heap cannot shrink below this one
    del freed
    assert (peak_bytes(blocks) or 0) > 0.8 * size * number
    assert len(above) == size


def kept_for_backward(rank: int, dim: int) -> int | None:
    group, workload = dist.group.WORLD, DispatchWorkload.of(replace(ROUTED, dim=dim, tokens=(50, 30)))
    assert group is not None
    case, contender = workload.case(rank), contenders_of("dispatch", "")["experts weigh"](workload, group)
    contender.forward(*case.inputs)  # what a sharding keeps is made once
    gc.collect()
    gc.freeze()
    try:
        return account("experts weigh", Run(contender, case)).kept_bytes
    finally:
        gc.unfreeze()


def test_dispatch_and_combine_keep_indices_only(rank_pool: RankPool) -> None:
    """However wide the rows are. M 80, S and R about 80, t 50 or 30: at most 8 numbers of 8 bytes for each."""
    narrow, wide = (rank_pool.run(kept_for_backward, 2, dim) for dim in (1, 256))
    assert narrow == wide
    assert all(kept is not None and 0 < kept < 8 * 8 * 100 for kept in narrow)
