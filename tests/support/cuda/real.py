"""The operations on real devices: a process for each, with NCCL between them."""

import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from .report import Report
from .tried.operation import Pass, Place, passes
from .tried.operations import OPERATIONS

NO_GPU = 3  # what a run ends with where there is nothing to run on
WAITED = "waits"  # in place of a line


def number_of_gpus() -> int:
    """At least 1; else the run ends, and is not a pass."""
    number = torch.cuda.device_count()
    if not number:
        pytest.exit("there is no CUDA device on this machine, so nothing was tested on one", returncode=NO_GPU)
    return number


class RealGpu:
    """The device of this process."""

    def __init__(self, rank: int) -> None:
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)

    def tensor(self, x: Tensor) -> Tensor:
        return x.detach().to(self.device, copy=True).requires_grad_(x.requires_grad)

    def module(self, module: nn.Module) -> nn.Module:
        return module.to(self.device)

    def host(self, x: Tensor) -> Tensor:
        return x.cpu()

    @contextmanager
    def report(self, promised: int) -> Iterator[Report]:
        """A wait is an error where none is promised; else they are counted."""
        report = Report()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn" if promised else "error")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                yield report
        finally:
            torch.cuda.set_sync_debug_mode("default")
        report.d2h[WAITED] = sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)


def in_processes(ranks: int, backend: str, place: Callable[[int], Place]) -> list[dict[str, tuple[Pass, Pass] | str]]:
    """Of each rank, by the name of the operation: its passes, or the text of its exception.

    A rank that raised leaves its peers in a collective, so the operations after it are not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_live, (folder, ranks, backend, place), nprocs=ranks)
        return [torch.load(Path(folder, f"{rank}"), weights_only=False) for rank in range(ranks)]


def _live(rank: int, folder: str, ranks: int, backend: str, place: Callable[[int], Place]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    here, found = place(rank), dict[str, tuple[Pass, Pass] | str]()
    for operation in OPERATIONS:
        torch.manual_seed(0)  # as ranks that are threads are seeded
        try:
            found[operation.name] = passes(operation, rank, here)
        except Exception:
            found[operation.name] = traceback.format_exc()
            break
    torch.save(found, Path(folder, f"{rank}"))
    dist.destroy_process_group()
