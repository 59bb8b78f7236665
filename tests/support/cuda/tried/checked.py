"""What an operation has to be on a device: the same numbers as on the CPU, and no wait but those promised."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_dispatch.testing import RankThreads
from tests.support.tensors import difference

from ..device import FakeGpu
from ..ranks import results_on_cuda
from ..report import Report
from .operation import HostPlace, Operation, Pass, passes

# Writes in an order that the device chooses, and why that changes no result.
HARMLESS = {
    "scatter_ at plan/static_index.py": "what has no slot goes to one behind the last, which is cut off",
    "sort at plan/counts/sent.py": "equal ranks are alike, and where they stood is not asked",
    "sort at plan/static_index.py": "equal ranks are alike, and where they stood is not asked",
    "index_put_ at plan/node_pieces.py": "rows of one token write the same token",
    "index_put_ at rows/functions.py": "unused rows write to the spare one, which is cut off",
    "index_add at autograd": "a head of keys has two copies here, whose sum has no order; of more it has one",
    "index_add_ at layer/balance.py": "counts are whole numbers",
}
# What offload is for, the few numbers of a batch and of a table, the counts of a plan.
IN_BACKGROUND = {"spread/waiting.py", "layout/on_device.py", "plan/host_copy.py"}


def unlike(got: Tensor, wanted: Tensor, tolerance: float) -> bool:
    if not tolerance or not wanted.is_floating_point():
        return got.dtype != wanted.dtype or not torch.equal(got, wanted)
    return difference(got, wanted) > tolerance


def check_values(operation: Operation, got: Sequence[Pass], wanted: Sequence[Pass]) -> None:
    for rank, (mine, right) in enumerate(zip(got, wanted, strict=True)):
        for number, (value, right_value) in enumerate(zip(mine.values, right.values, strict=True)):
            assert not unlike(value, right_value, operation.tolerance), f"rank {rank}, tensor {number}"


def unordered(report: Report) -> set[str]:
    """Without numbers of lines."""
    return {told.rpartition(":")[0] or told for told in report.unordered}


def check(operation: Operation, ranks: int, threads: RankThreads) -> list[Report]:
    """Run it on the CPU, and twice on devices that are not there: first with exchanges that happen when they are
    waited for, then, warm, with exchanges that happen when they are started.

    Returns:
        Of each rank, what the warm forward did, and then what the warm backward did.

    Raises:
        AssertionError, RuntimeError: what is wrong.
    """

    def on_the_host(rank: int) -> tuple[Pass, Pass]:
        return passes(operation, rank, HostPlace())

    def at_both_times(rank: int, gpu: FakeGpu) -> tuple[Pass, Pass]:
        def hurry() -> None:
            gpu.schedule = "at start"

        return passes(operation, rank, gpu, hurry)

    both = results_on_cuda(at_both_times, ranks, "at wait")
    for got, wanted in zip(zip(*both, strict=True), zip(*threads.run(on_the_host, ranks), strict=True), strict=True):
        check_values(operation, got, wanted)
    for rank, (_, warm) in enumerate(both):
        waits = (warm.forward.d2h.total(), warm.backward.d2h.total())
        assert waits == operation.d2h, f"rank {rank} waits at {warm.forward.d2h} and {warm.backward.d2h}"
        assert not warm.forward.h2d, f"rank {rank} copies in forward"
        assert {told.rpartition(":")[0] for told in warm.forward.background} <= IN_BACKGROUND
        assert not warm.backward.h2d, f"rank {rank} copies in backward"
        unexplained = (unordered(warm.forward) | unordered(warm.backward)) - set(HARMLESS)
        assert not unexplained, f"rank {rank}"
    return [report for _, warm in both for report in (warm.forward, warm.backward)]
