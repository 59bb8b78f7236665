"""What a sharding makes on a device: numbers that nobody waits for, and tensors that any stream may take."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def ints_on(values: Sequence[Any], device: torch.device | str) -> Tensor:
    """int64 of Python ints, nested or not. ``torch.tensor(values, device=...)`` waits for CUDA; from pinned memory
    nobody does."""
    device = torch.device(device)
    if device.type != "cuda" or torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.int64, device=device)
    return copied_to(torch.tensor(values, dtype=torch.int64, device="cpu"), device)


def copied_to(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``; for CUDA by pinned memory, as above."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Made:
    """What was made for a key, which may have a device in it. Kernels of one stream do not wait for those of another,
    and memory that is freed is given to its own stream again: so whoever takes it on another stream has that stream
    wait until it is there, and its memory wait for that stream before it is used again."""

    __slots__ = ("_device", "_others", "_ready", "_stream", "value")

    def __init__(self, value: Any, key: Hashable) -> None:
        parts = key if isinstance(key, tuple) else ()
        self.value = value
        self._device = next((x for x in parts if isinstance(x, torch.device) and x.type == "cuda"), None)
        self._ready, self._others = None, set[torch.cuda.Stream]()
        if self._device is not None and not torch.cuda.is_current_stream_capturing():
            self._stream, self._ready = torch.cuda.current_stream(self._device), torch.cuda.Event()
            self._ready.record(self._stream)

    def take(self) -> Any:
        """The value, for kernels of the current stream."""
        # A graph is captured after a warm-up and a synchronisation; to ask for an older event would end the capture.
        if self._ready is None or torch.cuda.is_current_stream_capturing():
            return self.value
        stream = torch.cuda.current_stream(self._device)
        if stream != self._stream and stream not in self._others:
            stream.wait_event(self._ready)
            for x in _tensors_of(self.value):
                x.record_stream(stream)
            self._others.add(stream)
        return self.value


def _tensors_of(value: Any) -> Iterator[Tensor]:
    """Those on CUDA, of tuples and dataclasses, too."""
    if isinstance(value, Tensor) and value.is_cuda:
        yield value
    inside = value if isinstance(value, tuple) else []
    if is_dataclass(value):
        inside = [getattr(value, part.name) for part in fields(value)]
    for part in inside:
        yield from _tensors_of(part)
