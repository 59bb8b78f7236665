"""The copy of a plan to the host."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class HostCopy:
    """Numbers on their way to the host.

    On CUDA they go to pinned memory, and an event says when they are there. So the host waits for what came before
    the copy only: what is enqueued between :meth:`start` and :meth:`read` runs while it waits.
    """

    values: Tensor
    there: torch.cuda.Event | None

    @classmethod
    def start(cls, x_N: Tensor) -> "HostCopy":
        """Begin to copy (N,) ints."""
        if x_N.device.type != "cuda":
            return cls(x_N, None)
        values, there = torch.empty(x_N.shape, dtype=x_N.dtype, device="cpu", pin_memory=True), torch.cuda.Event()
        values.copy_(x_N, non_blocking=True)
        there.record(torch.cuda.current_stream(x_N.device))
        return cls(values, there)

    def read(self) -> list[int]:
        """Wait for them."""
        if self.there is not None:
            self.there.synchronize()
        return self.values.tolist()
