"""A public operation as a step: what it is made of, forward, backward; on any device."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..report import Report


class Place(Protocol):
    """Where a step runs: the CPU, a device that is not there, or a real one."""

    device: torch.device

    def tensor(self, x: Tensor) -> Tensor:
        """A copy of a host tensor there; a leaf."""
        ...

    def module(self, module: nn.Module) -> nn.Module:
        """``module``, there."""
        ...

    def host(self, x: Tensor) -> Tensor:
        """Its values."""
        ...

    def report(self, promised: int) -> AbstractContextManager[Report]:
        """Gives the report of its block, which may wait for the other side so often."""
        ...


def nothing() -> None:
    """Nothing to prepare."""


@dataclass(frozen=True, slots=True)
class Step:
    """What is repeated in training.

    Attributes:
        forward: gives tensors; those with a graph are differentiated.
        leaves: what gets a gradient.
        prepare: called before each forward.
    """

    forward: Callable[[], Sequence[Tensor]]
    leaves: Sequence[Tensor] = ()
    prepare: Callable[[], None] = nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A public operation in a case of any number of ranks.

    Attributes:
        name: as the table has it.
        step: of (rank, place); what it makes is made once.
        d2h: copies to the host that are promised, forward and backward.
        tolerance: how far results may be from the CPU's; 0 where it runs the same kernels, so that bits are the same.
    """

    name: str
    step: Callable[[int, Place], Step]
    d2h: tuple[int, int] = (0, 0)
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass of a step gave and did: results and gradients, on the host, and the reports of both ways."""

    values: list[Tensor]
    forward: Report
    backward: Report


def run_step(step: Step, place: Place, promised: tuple[int, int]) -> Pass:
    """Forward, and backward with a gradient of 1, 2, 3, ..."""
    for leaf in step.leaves:
        leaf.grad = None
    step.prepare()
    with place.report(promised[0]) as forward:
        outs = step.forward()
    roots = [out for out in outs if out.requires_grad]
    grads = [
        place.tensor((torch.arange(out.numel(), dtype=torch.float64, device="cpu") + 1).view(out.shape).to(out.dtype))
        for out in roots
    ]
    with place.report(promised[1]) as backward:
        if roots:
            torch.autograd.backward(roots, grads)
    found = [*outs, *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in step.leaves)]
    return Pass([place.host(x.detach()).clone() for x in found], forward, backward)


MANY = 1000  # waits of a pass that makes what is kept


def passes(operation: Operation, rank: int, place: Place, between: Callable[[], None] = nothing) -> tuple[Pass, Pass]:
    """The first, and a warm one."""
    step = operation.step(rank, place)
    first = run_step(step, place, (MANY, MANY))
    between()
    return first, run_step(step, place, operation.d2h)


class HostPlace:
    """The CPU."""

    device = torch.device("cpu")

    def tensor(self, x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(x.requires_grad)

    def module(self, module: nn.Module) -> nn.Module:
        return module

    def host(self, x: Tensor) -> Tensor:
        return x

    def report(self, promised: int) -> AbstractContextManager[Report]:
        return nullcontext(Report())
