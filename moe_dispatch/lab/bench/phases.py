"""Where the time of a contender goes: one profile, its operations grouped by what they do."""

import time
from typing import Protocol

import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

REPETITIONS = 3
# The first group that has the start of an operation's name gets it.
GROUPS = (
    ("exchange", ("gloo:", "nccl:")),  # from the call to the last row's arrival: peers that are late count here
    ("attention", ("aten::_scaled_dot_product_flash", "aten::_softmax", "aten::bmm", "aten::mm", "aten::exp")),
    (
        "sum rows",
        ("aten::_embedding_bag", "aten::embedding_bag", "aten::index_add", "aten::sum", "aten::scatter_add"),
    ),
    ("gather rows", ("aten::index", "aten::gather")),
    ("copy", ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous", "aten::_to_copy", "aten::repeat")),
    ("fill", ("aten::zero", "aten::fill_", "aten::new_zeros", "aten::empty", "aten::resize_")),
    ("sort", ("aten::sort", "aten::argsort", "aten::topk", "aten::cumsum", "aten::nonzero", "aten::bucketize")),
    ("arithmetic", ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::where", "aten::ge", "aten::lt")),
    ("other operations", ("aten::", "c10d::")),
)
REST = "Python and the rest"


class Timed(Protocol):
    def forward(self) -> Tensor: ...
    def backward(self, out: Tensor) -> object: ...


def phases_of(run: Timed) -> dict[str, float]:
    """Milliseconds of one forward + backward in each phase on this rank. Every rank of the default group calls it."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        dist.barrier()  # a profiler takes its time to start
        start = time.perf_counter()
        for _ in range(REPETITIONS):
            run.backward(run.forward())
        seconds = time.perf_counter() - start
    phases = dict.fromkeys([name for name, _ in GROUPS], 0.0)
    for event in profiled.key_averages():
        group = next((name for name, starts in GROUPS if event.key.startswith(starts)), None)
        if group and "barrier" not in event.key:
            # a collective ends on another thread: what the operation itself took is not its time
            microseconds = event.cpu_time_total if group == "exchange" else event.self_cpu_time_total
            phases[group] += microseconds / 1e3 / REPETITIONS
    phases[REST] = max(seconds * 1e3 / REPETITIONS - sum(phases.values()), 0.0)
    return phases
