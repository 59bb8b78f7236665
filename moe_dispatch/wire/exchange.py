"""The all-to-all of rows, differentiable or in the background, and the all-gather where every rank gets the same. The
only file that calls these collectives."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .callers import check_callers, check_memory
from .local_tensors import refuse_dtensors
from .policies import unseen_by_policies


class _ExchangeRows(torch.autograd.Function):
    """forward   received = E rows
    backward  d rows   = Eᵀ d received, the same exchange with the counts swapped

    A compiled checkpoint recomputes an exchange on the ranks whose backward needs something of it. To save no rows
    costs nothing: so where none came, the compiler leaves the exchange out, and the peers wait. In compiled code each
    rank therefore sends itself one row more, ``extra``, and backward sends what came of it; elsewhere that is no row.
    """

    @staticmethod
    @unseen_by_policies
    def forward(
        ctx: Any,
        rows: Tensor,
        extra: Tensor,
        sent: tuple[int, ...],
        received: tuple[int, ...],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        if not len(extra):
            out = rows.new_empty((sum(received), *rows.shape[1:]))
            _exchange(out, rows.contiguous(), sent, received, group, in_background=False)
            return out
        (sent_before, sent), (received_before, received) = (_one_more(way, group.rank()) for way in (sent, received))
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        with_extra = rows.new_empty((sum(sent), *rows.shape[1:]))
        # Copies, since cat forgets tensors without rows: backward has to follow from the gradients.
        for part, x in zip(
            with_extra.tensor_split([sent_before, sent_before + 1]),
            (rows[:sent_before], extra, rows[sent_before:]),
            strict=True,
        ):
            part.copy_(x)
        _exchange(out, with_extra, sent, received, group, in_background=False)
        ctx.save_for_backward(out[received_before : received_before + 1])
        return torch.cat([out[:received_before], out[received_before + 1 :]])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        extra = ctx.saved_tensors[0] if ctx.saved_tensors else grads[0][:0]
        return _ExchangeRows.apply(grads[0], extra, ctx.received, ctx.sent, ctx.group), None, None, None, None  # type: ignore[return-value]


def _one_more(counts: tuple[int, ...], rank: int) -> tuple[int, tuple[int, ...]]:
    """How many rows come before those of ``rank``, and the counts with one row more for it."""
    return sum(counts[:rank]), (*counts[:rank], counts[rank] + 1, *counts[rank + 1 :])


@dataclass(frozen=True, slots=True, eq=False)
class PendingExchange:
    """Rows on their way. Holds the rows sent until they have arrived."""

    rows: Tensor
    out: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """The rows received. On CUDA only the current stream waits, not the host."""
        self.work.wait()
        return self.out


@dataclass(frozen=True, slots=True, eq=False)
class FinishedExchange:
    """Rows that are there already."""

    rows: Tensor

    def wait(self) -> Tensor:
        return self.rows


def start_exchange(
    rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> PendingExchange | FinishedExchange:
    """:func:`exchange_rows` in the background: no gradient, no checks, contiguous rows, the result at ``wait()``.

    Compiled code waits here: torch.compile knows no collective in the background.
    """
    if len(sent) == 1:
        return FinishedExchange(rows)
    return start_exchange_into(rows.new_empty((sum(received), *rows.shape[1:])), rows, sent, received, group)


def start_exchange_into(
    out: Tensor, rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> PendingExchange | FinishedExchange:
    """:func:`start_exchange` into the first rows of ``out``, which ``wait()`` gives whole: what the caller writes
    behind them need not travel. A group of one rank moves nothing."""
    if len(sent) == 1:
        return FinishedExchange(out)
    work = _exchange(out[: sum(received)], rows, sent, received, group, not torch.compiler.is_compiling())
    return FinishedExchange(out) if work is None else PendingExchange(rows, out, work)


def is_one_message(sizes: Sequence[int], device_type: str) -> bool:
    """Whether rows that every rank gets go to all at once, in an all-gather, padded to the longest of ``sizes``. Else
    a copy of them goes to each rank, in an all-to-all of the real lengths.

    On CUDA, where padding is at most a quarter of what is sent: then nobody makes a copy per rank, and NCCL sends no
    copy for each rank of another node. gloo's all-gather is a ring, which takes 1.1 to 1.5 times as long at 4 ranks.
    And where ranks believe in other sizes, so that they may be in other collectives, gloo waits, whereas it ends a
    rank that gets a message of another length.
    """
    return device_type == "cuda" and 0 < 4 * len(sizes) * max(sizes) <= 5 * sum(sizes)


def gathered_starts(sizes: Sequence[int], device_type: str) -> tuple[int, ...]:
    """Where the rows of each rank begin in what :func:`start_gather` brings."""
    if is_one_message(sizes, device_type):
        return tuple(rank * max(sizes) for rank in range(len(sizes)))
    return tuple(accumulate(sizes[:-1], initial=0))


def copies_sent(sizes: Sequence[int], device_type: str) -> int:
    """How many copies of its rows a rank passes to :func:`start_gather`."""
    return 1 if is_one_message(sizes, device_type) else len(sizes)


def start_gather(
    rows_CN: Tensor, sizes: Sequence[int], group: dist.ProcessGroup
) -> PendingExchange | FinishedExchange:
    """Every rank's rows to every rank, in the background: no gradient, no checks.

    Args:
        rows_CN: (copies, rows, ...), contiguous: :func:`copies_sent` of the ``sizes[rank]`` rows of this rank.
        sizes: how many rows each rank has.

    What comes has those of each rank from its :func:`gathered_starts` on; what may lie between them means nothing.
    """
    if rows_CN.shape[0] > 1:
        return start_exchange(rows_CN.flatten(0, 1), (rows_CN.shape[1],) * len(sizes), sizes, group)
    rows, longest = rows_CN[0], max(sizes)
    if len(sizes) == 1:
        return FinishedExchange(rows)
    if len(rows) < longest:
        rows = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    out = rows.new_empty((len(sizes) * longest, *rows.shape[1:]))
    check_memory(out, rows)
    work = dist.all_gather_single(out, rows, group=group, async_op=True)
    return FinishedExchange(out) if work is None else PendingExchange(rows, out, work)


def _exchange(
    out: Tensor,
    rows: Tensor,
    sent: Sequence[int],
    received: Sequence[int],
    group: dist.ProcessGroup,
    in_background: bool,
) -> dist.Work | None:
    check_memory(out, rows)
    return dist.all_to_all_single(out, rows, list(received), list(sent), group=group, async_op=in_background)


def check_is_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """``group``; ValueError unless it is a process group. No communication."""
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group is {group!r}; pass the process group explicitly, e.g. torch.distributed.group.WORLD once "
            "init_process_group has run, or device_mesh.get_group()"
        )
    return group


def check_group(group: dist.ProcessGroup, num_ranks: int, what: str) -> None:
    """Raise ValueError unless ``group`` is a process group of ``num_ranks`` ranks, and may exchange something now. No
    communication.

    Args:
        what: that has a piece for each rank.
    """
    check_is_group(group)
    check_callers(num_ranks)
    if group.size() != num_ranks:
        raise ValueError(
            f"{what} describes {num_ranks} ranks, but the group has {group.size()}; they have to be equal, one "
            "piece per rank in the group's rank order (for a group that is part of a mesh: sharding.select(ranks))"
        )


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Send ``sent[r]`` consecutive rows to each rank r of ``group``; return the rows received, in rank order.

    Args:
        rows: (sum(sent), ...), any dtype the backend carries, any strides.
        sent: rows for each rank; 0 is ordinary.
        received: rows from each rank: what that rank's ``sent`` says for this one.
        group: the process group; a group of one rank communicates nothing.

    Returns:
        (sum(received), ...).

    The gradient makes the same call with the counts swapped, also on a rank that has no rows. Counts that two ranks
    do not agree on cannot be seen from one of them: the backend reports them, or waits.

    Raises:
        ValueError: counts of the wrong number or sum, a group that is not one, or a DTensor. Raised before the
            collective.
    """
    refuse_dtensors(rows=rows)
    sent, received = tuple(sent), tuple(received)
    check_group(group, len(sent), f"sent = {sent}")
    if len(received) != len(sent) or min(*sent, *received) < 0 or sum(sent) != rows.shape[0]:
        raise ValueError(
            f"{rows.shape[0]} rows with sent = {sent} and received = {received}; both need one count >= 0 per rank, "
            "and sent has to sum to the number of rows"
        )
    if len(sent) == 1:
        if sent != received:
            raise ValueError(f"sent = {sent} and received = {received} in a group of one rank; they have to be equal")
        return rows
    extra = rows.new_zeros((int(torch.compiler.is_compiling()), *rows.shape[1:]))
    return _ExchangeRows.apply(rows, extra, sent, received, group)  # type: ignore[return-value]
