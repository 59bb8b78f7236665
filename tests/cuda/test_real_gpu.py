"""Every public operation on the devices of this machine: `make test-gpu`. With one device, a group of one rank."""

from collections.abc import Sequence
from unittest import mock

import pytest
import torch

from moe_dispatch.testing import RankThreads
from tests.support.cuda.real import NO_GPU, RealGpu, in_processes, number_of_gpus
from tests.support.cuda.tried.operation import HostPlace, Operation, Pass, passes
from tests.support.cuda.tried.operations import OPERATIONS
from tests.support.tensors import difference

# Other kernels, in another order: relative to the largest value.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2}
Results = list[dict[str, tuple[Pass, Pass] | str]]


@pytest.fixture(scope="module")
def on_gpus() -> Results:
    return in_processes(number_of_gpus(), "nccl", RealGpu)


def check(operation: Operation, wanted: Sequence[tuple[Pass, Pass]], results: Results) -> None:
    for rank, (right, found) in enumerate(zip(wanted, results, strict=True)):
        got = found.get(operation.name, "not run: an operation before it raised")
        assert not isinstance(got, str), f"rank {rank}: {got}"
        for mine, right_pass in zip(got, right, strict=True):
            for value, right_value in zip(mine.values, right_pass.values, strict=True):
                if value.is_floating_point():
                    assert difference(value, right_value) < TOLERANCE[value.dtype], f"rank {rank}"
                else:
                    assert value.equal(right_value), f"rank {rank}"
        warm = got[1]
        assert warm.forward.d2h.total() <= operation.d2h[0], f"rank {rank}"
        assert warm.backward.d2h.total() <= operation.d2h[1], f"rank {rank}"


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_an_operation_on_the_gpus_of_this_machine(
    operation: Operation, on_gpus: Results, rank_threads: RankThreads
) -> None:
    def on_the_host(rank: int) -> tuple[Pass, Pass]:
        return passes(operation, rank, HostPlace())

    check(operation, rank_threads.run(on_the_host, len(on_gpus)), on_gpus)


def test_without_a_gpu_the_run_ends_and_is_no_pass() -> None:
    with mock.patch.object(torch.cuda, "device_count", return_value=0), pytest.raises(pytest.exit.Exception) as ended:
        number_of_gpus()
    assert ended.value.returncode == NO_GPU
    assert str(ended.value) == "there is no CUDA device on this machine, so nothing was tested on one"


def host(rank: int) -> HostPlace:
    return HostPlace()


@pytest.mark.sweep
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_same_processes_run_on_the_cpu(ranks: int, rank_threads: RankThreads) -> None:
    """With gloo: whatever the number of devices, each operation has a case of so many ranks."""
    found = in_processes(ranks, "gloo", host)
    for operation in OPERATIONS:

        def on_the_host(rank: int, operation: Operation = operation) -> tuple[Pass, Pass]:
            return passes(operation, rank, HostPlace())

        check(operation, rank_threads.run(on_the_host, ranks), found)
