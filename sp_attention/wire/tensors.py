"""Boxes of tensors of any strides to each rank, in one collective."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch.internals import FinishedExchange, PendingExchange, start_exchange

from .boxes import Box, Next, Parts, RankRun


class Cut(NamedTuple):
    """Tensors, (B, l, N, H) or (l, B, N, H) each, and which boxes of them each rank gets, or gives."""

    tensors: Sequence[Tensor]
    parts: Parts

    def own(self) -> list[Tensor]:
        """The boxes of this rank, views."""
        found: list[Tensor] = []
        for x, dim, boxes in zip(self.tensors, self.parts.token_dims, self.parts.own, strict=True):
            found += [_box(x, dim, box) for box in boxes]
        return found

    def message_sizes(self) -> list[int]:
        """How many numbers go to, or come from, each rank; 0 for this one, which keeps its own."""
        sizes: list[int] = []
        for x, dim, places in zip(self.tensors, self.parts.token_dims, self.parts.places, strict=True):
            numel = x.shape[1 - dim] * x.shape[3]
            sizes = [n * numel + size for n, size in zip(places, sizes or [0] * len(places), strict=True)]
        return sizes

    def with_messages(self, buffer: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each run of ranks and each box, its parts of the messages of all other ranks, which are side by side in
        a buffer, and of the tensor: views of one shape, (ranks, *box) or that of a box."""
        runs = self.parts.runs
        views = [self._views(run) for run in runs]
        sizes = [[x.numel() // run.ranks for x in of_run] for run, of_run in zip(runs, views, strict=True)]
        lengths = [sum(of_run) * run.ranks for run, of_run in zip(runs, sizes, strict=True)]
        pairs: list[tuple[Tensor, Tensor]] = []
        messages = buffer.split_with_sizes(lengths) if runs else ()
        for run, message, of_run, numbers in zip(runs, messages, views, sizes, strict=True):
            by_rank = message if run.ranks == 1 else message.view(run.ranks, sum(numbers))
            parts = by_rank.split_with_sizes(numbers, dim=-1) if numbers else ()
            pairs += [(part.view(x.shape), x) for part, x in zip(parts, of_run, strict=True)]
        return _with_elements(pairs)

    def _views(self, run: RankRun) -> list[Tensor]:
        """The boxes of a run of ranks, (ranks, *box) each; those of a single rank as they are."""
        views: list[Tensor] = []
        for x, dim, boxes, steps in zip(self.tensors, self.parts.token_dims, run.boxes, run.steps, strict=True):
            if run.ranks == 1:
                views += [_box(x, dim, box) for box in boxes]
            else:
                views += [_side_by_side(x, dim, *it, run.ranks) for it in zip(boxes, steps, strict=True)]
        return views


def _with_elements(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Those pairs of equal shape that have something to copy. In compiled code all of them: there, what depends on
    what is the order of the exchanges."""
    return pairs if torch.compiler.is_compiling() else [pair for pair in pairs if pair[0].numel()]


def _narrow(x: Tensor, dim: int, start: int, size: int) -> Tensor:
    """A view, or ``x`` where that is all of it: half of the views are, and each takes a microsecond."""
    return x if size == x.size(dim) else x.narrow(dim, start, size)


def _box(x: Tensor, dim: int, box: Box) -> Tensor:
    return _narrow(_narrow(x, dim, box.token, box.tokens), 2, box.head, box.heads)


def _side_by_side(x: Tensor, dim: int, box: Box, step: Next, ranks: int) -> Tensor:
    """(ranks, *box): the boxes of so many neighbours."""
    if step is Next.SAME:
        x = _box(x, dim, box)
        return x.expand(ranks, *x.shape) if x.numel() else x
    if step is Next.HEADS:
        x = _box(x, dim, box._replace(heads=ranks * box.heads))
        dim, size = 2, box.heads
    else:
        x = _box(x, dim, box._replace(tokens=ranks * box.tokens))
        size = box.tokens
    return x.view(*x.shape[:dim], ranks, size, *x.shape[dim + 1 :]).movedim(dim, 0)


def exchange_tensors(sent: Cut, received: Cut, group: dist.ProcessGroup) -> None:
    """Send boxes of tensors to each rank, and fill those that come from each rank. One collective.

    Args:
        sent: tensors of one dtype, of any strides, at least one; cut to be read.
        received: tensors to fill, with boxes of the shapes that come, in the order of the sender; cut to be filled.
        group: the process group.

    Each value is copied once before the collective and once after it. What a rank sends to itself is copied once,
    while the collective is under way. One copy serves a run of ranks.
    """
    start_tensors(sent, received, group).fill()


@dataclass(frozen=True, slots=True, eq=False)
class TensorsOnTheWay:
    """What :func:`start_tensors` started."""

    sent: Cut
    received: Cut
    pending: PendingExchange | FinishedExchange

    def fill(self) -> None:
        """Wait, and copy what came into the boxes of ``received``."""
        for x, out in self._own():
            out.copy_(x)
        for part, out in self.received.with_messages(self.pending.wait()):
            out.copy_(part)

    def add(self) -> None:
        """Wait, and add what came to the boxes of ``received``, in their dtype: this rank's own first, then in the
        order of the ranks. Those of one rank do not overlap; ``received`` is cut to be added to."""
        for x, out in self._own():
            out.add_(x)
        for part, out in self.received.with_messages(self.pending.wait()):
            out.add_(part)

    def _own(self) -> list[tuple[Tensor, Tensor]]:
        return _with_elements(list(zip(self.sent.own(), self.received.own(), strict=True)))


def start_tensors(sent: Cut, received: Cut, group: dist.ProcessGroup) -> TensorsOnTheWay:
    """:func:`exchange_tensors` in the background; for the tensors of ``received`` see :class:`TensorsOnTheWay`."""
    sizes_sent, sizes_received = sent.message_sizes(), received.message_sizes()
    buffer = sent.tensors[0].new_empty(sum(sizes_sent))
    for part, x in sent.with_messages(buffer):
        part.copy_(x)
    return TensorsOnTheWay(sent, received, start_exchange(buffer, sizes_sent, sizes_received, group))
