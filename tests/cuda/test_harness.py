"""The device that is not there sees what a real one would not forgive."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import exchange_rows
from tests.support.cuda.device import CUDA, FakeGpu, Schedule
from tests.support.cuda.ranks import ends_on_cuda, results_on_cuda
from tests.support.cuda.report import Report
from tests.support.ranks import world


def alone(case: Callable[[FakeGpu], Report]) -> Report:
    (report,) = results_on_cuda(lambda rank, gpu: case(gpu), 1)
    return report


def test_a_rank_that_raises_leaves_its_peers_waiting() -> None:
    def case(rank: int, gpu: FakeGpu) -> None:
        if rank == 1:
            raise ValueError("a mistake")
        exchange_rows(torch.ones(3, device=CUDA), (1, 1, 1), (1, 1, 1), world())

    with pytest.raises(AssertionError, match=r"ranks \[0, 2\] wait for their peers.*rank 1: ValueError\('a mistake'"):
        ends_on_cuda(case, 3)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda gpu: torch.ones(4, 2, device="cpu"), "No backend type associated with device type cpu"),
        (lambda gpu: torch.ones(4, 2, dtype=torch.int16, device=CUDA), "data type is not supported"),
        (lambda gpu: torch.ones(2, 4, device=CUDA).T, "Tensors must be contiguous"),
    ],
)
def test_what_nccl_does_not_carry_is_refused(make: Callable[[FakeGpu], Tensor], told: str) -> None:
    def case(rank: int, gpu: FakeGpu) -> None:
        dist.all_reduce(make(gpu))

    for end in ends_on_cuda(case, 2):
        assert isinstance(end.error, RuntimeError)
        assert told in str(end.error)


def test_counts_have_to_agree() -> None:
    def case(rank: int, gpu: FakeGpu) -> None:
        exchange_rows(torch.ones(2 + rank, device=CUDA), (1, 1 + rank), (1, 1), world())

    with pytest.raises(RuntimeError, match="rank 1 sends 2 numbers to rank 1, which expects 1"):
        results_on_cuda(case, 2)


@pytest.mark.parametrize(("schedule", "before"), [("at start", 7.0), ("at wait", float("nan"))])
def test_an_exchange_happens_when_it_is_started_or_when_it_is_waited_for(schedule: Schedule, before: float) -> None:
    def case(rank: int, gpu: FakeGpu) -> tuple[Tensor, Tensor]:
        out, x = torch.empty(2, device=CUDA), torch.full((2,), 7.0, device=CUDA)
        work = dist.all_to_all_single(out, x, async_op=True)
        assert work is not None
        early = gpu.host(out).clone()
        work.wait()
        return early, gpu.host(out)

    for early, late in results_on_cuda(case, 2, schedule):
        assert torch.allclose(early, torch.full((2,), before), equal_nan=True)
        assert late.tolist() == [7.0, 7.0]


@pytest.mark.parametrize("schedule", ["at start", "at wait"])
def test_what_is_sent_may_not_be_written_to_before_wait(schedule: Schedule) -> None:
    def case(rank: int, gpu: FakeGpu) -> None:
        out, x = torch.empty(2, device=CUDA), torch.ones(2, device=CUDA)
        work = dist.all_to_all_single(out, x, async_op=True)
        assert work is not None
        x.zero_()
        work.wait()

    with pytest.raises(RuntimeError, match="what is sent was written to before wait"):
        results_on_cuda(case, 2, schedule)


def test_memory_that_nobody_wrote_is_nan() -> None:
    def case(gpu: FakeGpu) -> Report:
        x = torch.zeros(3, device=CUDA)
        for made in (
            torch.empty(3, device=CUDA),
            torch.empty_like(x),
            x.new_empty(3),
            torch.empty_like(x.bfloat16()),
        ):
            assert gpu.host(made).isnan().all()
        assert gpu.host(torch.empty(3, dtype=torch.int32, device=CUDA)).tolist() == [-1, -1, -1]
        return Report()

    alone(case)


def test_experts_without_rows_have_gradients_that_nobody_wrote() -> None:
    def case(gpu: FakeGpu) -> Report:
        rows, matrices = torch.ones(8, 8, dtype=torch.bfloat16), torch.ones(3, 8, 8, dtype=torch.bfloat16)
        x, w = gpu.tensor(rows.requires_grad_()), gpu.tensor(matrices.requires_grad_())
        ends = gpu.tensor(torch.tensor([4, 4, 6], dtype=torch.int32))
        y = torch.nn.functional.grouped_mm(x, w, offs=ends)
        assert gpu.host(y.detach())[6:].isnan().all()
        y.backward(torch.ones_like(y))
        assert w.grad is not None
        assert gpu.host(w.grad).isnan().flatten(1).all(1).tolist() == [False, True, False]
        return Report()

    alone(case)


def read(x: Tensor) -> object:
    return x.tolist()


@pytest.mark.parametrize(
    ("call", "d2h", "h2d"),
    [
        (lambda x: x.sum().item(), 1, 0),
        (lambda x: x.cpu(), 1, 0),
        (lambda x: x.to("cpu"), 1, 0),
        (read, 1, 0),
        (lambda x: bool((x > 0).all()), 1, 0),
        (lambda x: x[x > 0], 1, 0),
        (lambda x: x.nonzero(), 1, 0),
        (lambda x: x.equal(x), 1, 0),
        (lambda x: torch.ones(3, device=x.device).repeat_interleave(x.to(torch.int64)), 1, 0),
        (lambda x: torch.tensor([1, 2], device=x.device), 0, 1),
        (lambda x: torch.ones(2, device="cpu").to(x.device), 0, 1),
        (lambda x: x[[0, 1]], 0, 1),
        (lambda x: x[torch.zeros(2, dtype=torch.int64, device="cpu")], 0, 1),
        (lambda x: x.masked_fill(x > 0, 2.0) * 3 + torch.full((), 1.0, device=x.device), 0, 0),
        (lambda x: torch.ones(2, device="cpu").pin_memory().to(x.device, non_blocking=True), 0, 0),
    ],
)
def test_copies_and_waits_are_seen(call: Callable[[Tensor], object], d2h: int, h2d: int) -> None:
    def case(gpu: FakeGpu) -> Report:
        x = torch.ones(3, device=CUDA)
        with gpu.report() as report:
            call(x)
        return report

    report = alone(case)
    assert (report.d2h.total(), report.h2d.total()) == (d2h, h2d)


def test_operands_on_two_devices_are_refused() -> None:
    def case(rank: int, gpu: FakeGpu) -> None:
        torch.add(torch.ones(3, device=CUDA), torch.ones(3, device="cpu"))

    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        results_on_cuda(case, 1)


def test_a_copy_to_pinned_memory_is_there_after_its_event() -> None:
    def case(gpu: FakeGpu) -> Report:
        x, out = torch.ones(3, device=CUDA), torch.empty(3, device="cpu", pin_memory=True)
        with gpu.report() as report:
            out.copy_(x, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            assert out.isnan().all()
            event.synchronize()
        assert out.tolist() == [1.0, 1.0, 1.0]
        assert report.background.total() == 1
        return report

    assert alone(case).d2h.total() == 1


def test_writes_without_an_order_are_seen() -> None:
    def case(gpu: FakeGpu) -> Report:
        to, index = torch.zeros(4, device=CUDA), gpu.tensor(torch.tensor([0, 1, 1]))
        with gpu.report() as report:
            to[index] = torch.ones(3, device=CUDA)
            to.index_add_(0, index, torch.ones(3, device=CUDA))
            index.sort()
            index.sort(stable=True)
            to[index[:2]] = torch.ones(2, device=CUDA)
        return report

    assert alone(case).unordered.total() == 3


def test_nothing_is_left_behind() -> None:
    def patched() -> list[object]:
        return [
            torch.nn.functional.scaled_dot_product_attention,
            torch.cuda.Event,
            torch.cuda.current_stream,
            torch.cuda._lazy_init,
            torch.Tensor.pin_memory,
            torch.accelerator.current_accelerator,
        ]

    before = patched()
    alone(lambda gpu: Report())
    assert patched() == before
    assert not dist.is_initialized()
