"""The copy of a plan to the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class HostCopy:
    """Ints of several tensors on their way to the host, in one copy.

    On CUDA they go to pinned memory, and an event says when they are there. So the host waits for what came before
    the copy only: what is enqueued between :meth:`start` and :meth:`read` runs while it waits.
    """

    values: Tensor
    there: torch.cuda.Event | None
    parts: Sequence[Tensor]

    @classmethod
    def start(cls, *parts_N: Tensor) -> "HostCopy":
        """Begin to copy tensors (N,), those of int64 before those of int32."""
        # An int64 is two of int32, as tensors of several dtypes would be a launch each.
        x_N = torch.cat([part.view(torch.int32) for part in parts_N])
        if x_N.device.type != "cuda":
            return cls(x_N.cpu(), None, parts_N)
        values, there = torch.empty(x_N.shape, dtype=x_N.dtype, device="cpu", pin_memory=True), torch.cuda.Event()
        values.copy_(x_N, non_blocking=True)
        there.record(torch.cuda.current_stream(x_N.device))
        return cls(values, there, parts_N)

    def read(self) -> list[list[int]]:
        """Wait for them: those of each tensor."""
        if self.there is not None:
            self.there.synchronize()
        sizes = [part.view(self.values.dtype).shape[0] for part in self.parts]
        values = self.values.split_with_sizes(sizes)
        return [value.view(part.dtype).tolist() for value, part in zip(values, self.parts, strict=True)]
