# pyright: reportIncompatibleMethodOverride=false
"""The device of one rank, and its tensors: every operation is checked, counted, and run on the CPU."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .report import AUTOGRAD, Report, line
from .rules import CHECKED, INDEXED, ORDERED, VIEWS, is_unordered, poison, refused, short, waits
from .tiles import kernels

CUDA = torch.device("cuda", 0)
# When the bytes of a collective move: as soon as it is started, or only when somebody waits for it. On a device it is
# any time between.
Schedule = Literal["at start", "at wait"]


class CudaTensor(Tensor):
    """A tensor that says ``cuda:0``. ``host`` has its values, ``gpu`` is the device that it is on."""

    host: Tensor
    gpu: "FakeGpu"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor, gpu: "FakeGpu") -> "CudaTensor":
        x = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device("cpu"),
        )  # type: ignore[attr-defined]
        x.host, x.gpu = host, gpu
        return x

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.host})"

    def tolist(self) -> Any:
        self.gpu.wait()
        return self.host.tolist()

    def cpu(self, *_: Any) -> Tensor:
        return self.to("cpu")

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if device is not None and device.type == "cpu":
            self.gpu.wait()
            return self.host.detach().to(dtype=dtype, copy=True)
        return self if dtype in (None, self.dtype) else Tensor.to(self, dtype)

    def record_stream(self, stream: Any) -> None:
        stream.uses.append(self)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu = next(x.gpu for x in _tensors_of([args, kwargs]) if isinstance(x, CudaTensor))
        return gpu.run(func, args, kwargs or {})


def pinned(x: Tensor) -> Tensor:
    """A tensor of the host that says so."""
    x._pinned = True  # type: ignore[attr-defined]
    return x


def is_pinned(x: Tensor) -> bool:
    return getattr(x, "_pinned", False)


class CudaStream:
    """A stream that keeps no order: it tells what it was made to wait for, what has to outlive its kernels, and
    whether a graph is captured on it."""

    def __init__(self, *, is_capturing: bool = False) -> None:
        self.is_capturing = is_capturing
        self.waited_for: list[object] = []
        self.uses: list[Tensor] = []

    def wait_event(self, event: object) -> None:
        assert not self.is_capturing, "an event from before the capture of a graph"
        self.waited_for.append(event)


class FakeGpu(TorchDispatchMode):
    """The device of one rank. Inside of it, operations are seen.

    Attributes:
        device: what the tensors say.
        schedule: when the bytes of collectives move.
        stream: the current one.
    """

    device = CUDA

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule: Schedule = schedule
        self._report = Report()
        self.stream = CudaStream()
        self._kernels = kernels()  # that the CPU does not have
        self.arriving: list[tuple[Tensor, Tensor]] = []  # pinned memory of the host, and what will be in it

    def tensor(self, x: Tensor) -> Tensor:
        """A copy of a host tensor on the device: a leaf, if it is one."""
        return CudaTensor(x.detach().clone(), self).requires_grad_(x.requires_grad)

    def host(self, x: Tensor) -> Tensor:
        """Its values, for the test: seen by nobody."""
        return x.host if isinstance(x, CudaTensor) else x

    def module(self, module: nn.Module) -> nn.Module:
        """``module``, with its parameters and buffers on the device."""
        for each in module.modules():
            for name, x in each._parameters.items():
                each._parameters[name] = None if x is None else nn.Parameter(self.tensor(x.detach()), x.requires_grad)
            for name, x in each._buffers.items():
                each._buffers[name] = None if x is None else self.tensor(x)
        return module

    @contextmanager
    def report(self, promised: int = 0) -> Iterator[Report]:
        """What the block does, whatever was promised."""
        before, self._report = self._report, Report()
        try:
            yield self._report
        finally:
            self._report = before

    def wait(self) -> None:
        """The host waits for a value."""
        self._report.d2h[line()] += 1

    def copy_from_host(self, x: Tensor | None = None, non_blocking: bool = False) -> None:
        self.arrive()  # both ways are in the order of one stream
        in_background = x is not None and is_pinned(x) and non_blocking
        (self._report.background if in_background else self._report.h2d)[line()] += 1

    def kernel(self) -> None:
        self._report.kernels += 1

    def collective(self, name: str) -> None:
        self._report.collectives.append(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def __enter__(self) -> Self:
        torch._C._set_only_lift_cpu_tensors(True)  # of this thread: Python numbers become a tensor of the host first
        return super().__enter__()

    def __exit__(self, *of_error: Any) -> None:
        super().__exit__(*of_error)
        torch._C._set_only_lift_cpu_tensors(False)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation, on the host's copies."""
        tensors = _tensors_of([args, kwargs])
        of_host = {id(x.host): x for x in tensors if isinstance(x, CudaTensor)}
        if kwargs.get("pin_memory"):
            return pinned(func(*args, **kwargs | {"pin_memory": False}))
        device = kwargs.get("device")
        is_made_here = device is not None and torch.device(device).type == "cuda"
        if not tensors and not is_made_here and torch._C._current_graph_task_id() != -1:
            is_made_here = line() == AUTOGRAD  # zeros in place of a gradient that there is not
        if not of_host and not is_made_here:
            return func(*args, **kwargs)
        name = short(func)
        self._look_at_operands(name, func, args, kwargs, tensors)
        args, kwargs = (
            _each(lambda x: x.host if isinstance(x, CudaTensor) else x, given) for given in (args, kwargs)
        )
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        if name in CHECKED:
            self._look_at_values(name, func, args, kwargs)
        out = (self._kernels.get(func.name()) or func)(*args, **kwargs)
        if isinstance(out, Tensor):
            poison(name, out, args, kwargs)
            if self.arriving and out is self.arriving[-1][0]:
                poison("empty", out, (), {})  # until somebody waits for it
        is_between = name in ("copy_", "_to_copy") and len(of_host) < len(tensors)  # the copy engine's, no kernel
        if name not in VIEWS and not is_between and any(x.numel() for x in _tensors_of([out]) or tensors):
            self.kernel()
        return _each(lambda x: of_host[id(x)] if id(x) in of_host else CudaTensor(x, self), out)

    def _look_at_operands(
        self, name: str, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> None:
        """Operands on two devices, and copies between them."""
        away = [x for x in tensors if not isinstance(x, CudaTensor)]
        if name == "_to_copy":
            if away:
                self.copy_from_host(away[0], bool(kwargs.get("non_blocking")))
        elif away and len(away) < len(tensors):
            if name == "copy_":
                self._copy_between(*args)
            elif name in INDEXED:
                self.copy_from_host()
            elif any(x.ndim for x in away):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {func.name()} of "
                    f"{[tuple(x.shape) for x in tensors]} at {line()}"
                )
            elif name == "where":  # a number, which becomes a tensor of the host
                self.copy_from_host()

    def _copy_between(self, to: Tensor, x: Tensor, non_blocking: bool = False) -> None:
        if not isinstance(x, CudaTensor):
            self.copy_from_host(x, non_blocking)
        elif non_blocking and is_pinned(to):
            self._report.background[line()] += 1
            self.arriving.append((to, x.host.clone()))
        else:
            self.wait()

    def arrive(self) -> None:
        """What was copied to pinned memory is there."""
        with _disable_current_modes():
            for to, x in self.arriving:
                to.copy_(x)
        self.arriving = []

    def _look_at_values(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if waits(name, func, args, kwargs):
            self.wait()
        if name in ORDERED and is_unordered(name, func, args):
            self._report.unordered[f"{name} at {line()}"] += 1
        if problem := refused(name, args, kwargs):
            raise RuntimeError(f"{problem}, at {line()}")


def _tensors_of(given: Iterable[Any]) -> list[Tensor]:
    """All tensors of arguments."""
    found: list[Tensor] = []
    for x in given:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple | dict):
            found += _tensors_of(x.values() if isinstance(x, dict) else x)
    return found


def _each(change: Callable[[Tensor], Any], given: Any) -> Any:
    """Arguments, or results, with each tensor changed."""
    if isinstance(given, Tensor):
        return change(given)
    if isinstance(given, dict):
        return {name: _each(change, x) for name, x in given.items()}
    return type(given)(_each(change, x) for x in given) if isinstance(given, list | tuple) else given
