"""Tensors of any shapes and strides to each rank, in one collective."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch.distributed as dist
from torch import Tensor

from moe_dispatch.internals import FinishedExchange, PendingExchange, start_exchange

Tensors = Sequence[Tensor]


def exchange_tensors(sent: Sequence[Tensors], received: Sequence[Tensors], group: dist.ProcessGroup) -> None:
    """Send tensors of any shapes to each rank, and fill those that come from each rank. One collective.

    Args:
        sent: for each rank, the tensors that it gets; all of one dtype, of any strides. This rank gets at least one.
        received: for each rank, the tensors to fill, of the shapes that it sends.
        group: the process group.

    Each value is copied once before the collective and once after it. What a rank sends to itself is copied once,
    while the collective is under way.
    """
    start_tensors(sent, received, group, sent[group.rank()][0]).fill()


@dataclass(frozen=True, slots=True, eq=False)
class TensorsOnTheWay:
    """What :func:`start_tensors` started."""

    sent: Sequence[Tensors]
    received: Sequence[Tensors]
    rank: int
    pending: PendingExchange | FinishedExchange

    def fill(self) -> None:
        """Wait, and copy what came into the tensors of ``received``."""
        for x, out in zip(self.sent[self.rank], self.received[self.rank], strict=True):
            out.copy_(x)
        for part, out in self._arrived():
            out.copy_(part)

    def add(self) -> None:
        """Wait, and add what came to the tensors of ``received``, in their dtype: this rank's own first, then in the
        order of the ranks."""
        for x, out in zip(self.sent[self.rank], self.received[self.rank], strict=True):
            out.add_(x)
        for part, out in self._arrived():
            out.add_(part)

    def _arrived(self) -> list[tuple[Tensor, Tensor]]:
        outs = list(chain(*(outs for rank, outs in enumerate(self.received) if rank != self.rank)))
        parts = self.pending.wait().split_with_sizes([out.numel() for out in outs]) if outs else ()
        if not outs:
            self.pending.wait()
        return [(part.view(out.shape), out) for part, out in zip(parts, outs, strict=True)]


def start_tensors(
    sent: Sequence[Tensors], received: Sequence[Tensors], group: dist.ProcessGroup, like: Tensor
) -> TensorsOnTheWay:
    """:func:`exchange_tensors` in the background. ``like`` has the dtype and device of the tensors.

    ``received`` may be views, and overlap: see :meth:`TensorsOnTheWay.add`.
    """
    rank = group.rank()
    to_others, from_others = ([[] if r == rank else xs for r, xs in enumerate(way)] for way in (sent, received))
    sizes_sent, sizes_received = ([[x.numel() for x in xs] for xs in way] for way in (to_others, from_others))
    buffer = like.new_empty(sum(map(sum, sizes_sent)))
    for part, x in zip(buffer.split_with_sizes(list(chain(*sizes_sent))), chain(*to_others), strict=True):
        part.view(x.shape).copy_(x)
    pending = start_exchange(buffer, list(map(sum, sizes_sent)), list(map(sum, sizes_received)), group)
    return TensorsOnTheWay(sent, received, rank, pending)
