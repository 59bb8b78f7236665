"""What a sharding keeps on a device: made without a wait, and taken by other streams when it is there."""

from dataclasses import dataclass

import pytest
import torch

from moe_dispatch import Partition, TokenSharding
from tests.support.cuda.device import CUDA, CudaStream, FakeGpu
from tests.support.cuda.ranks import results_on_cuda
from tests.support.cuda.tried.operation import Operation, run_step
from tests.support.cuda.tried.operations import OPERATIONS, RANKS

PLANS = [operation for operation in OPERATIONS if operation.name.startswith(("plan_", "place_tokens"))]


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize("operation", PLANS, ids=lambda operation: operation.name)
def test_what_is_kept_is_made_of_numbers_that_nobody_waits_for(operation: Operation) -> None:
    def case(rank: int, gpu: FakeGpu) -> None:
        first = run_step(operation.step(rank, gpu), gpu, (0, 0))
        assert not first.forward.h2d
        assert first.forward.d2h.total() == operation.d2h[0]

    results_on_cuda(case, RANKS)


@dataclass
class Kept:
    numbers: torch.Tensor
    more: tuple[torch.Tensor, int, torch.Tensor]


def test_another_stream_waits_until_it_is_made_and_its_memory_waits_for_that_stream() -> None:
    def case(rank: int, gpu: FakeGpu) -> None:
        sharding, made_on, other = TokenSharding(batch=2, seq=Partition((3,))), CudaStream(), CudaStream()
        gpu.stream = made_on

        def numbers() -> torch.Tensor:
            return torch.arange(3, device=CUDA)

        def take() -> Kept:
            return sharding.keep(
                ("numbers", CUDA), lambda: Kept(numbers(), (numbers(), 2, torch.zeros(2, device="cpu")))
            )

        made = take()
        assert take() is made
        assert not made_on.waited_for
        assert not made_on.uses
        gpu.stream = other
        assert take() is made
        assert take() is made
        assert len(other.waited_for) == 1
        assert [id(x) for x in other.uses] == [id(made.numbers), id(made.more[0])]
        gpu.stream = CudaStream(is_capturing=True)
        assert take() is made
        assert not gpu.stream.uses

    results_on_cuda(case, 1)


def test_facts_and_tensors_of_the_host_have_no_stream() -> None:
    def case(rank: int, gpu: FakeGpu) -> None:
        sharding = TokenSharding(batch=2, seq=Partition((3,)))
        for key in ("text", ("facts", 3), ("numbers", torch.device("cpu"))):
            sharding.keep(key, lambda: "value")
            gpu.stream = CudaStream()
            assert sharding.keep(key, lambda: "another") == "value"
            assert not gpu.stream.waited_for

    results_on_cuda(case, 1)
