"""What a workload costs with nothing around it.

For dispatch and the exchange of Ulysses: ``all_to_all_single`` between buffers that are there already. A rank's own
rows pass through the collective as well, as they usually do. Ours keep them out of it, so the bytes on the wire are
the same, but the backend's own copy is in the floor only.

For attention: the attention, where nothing has to be exchanged.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sp_attention import scaled_dot_product

from ....plan.ids.format import STEP, IdFormat
from ..workloads.attention import AttentionWorkload
from ..workloads.dispatch import DispatchWorkload
from ..workloads.of_config import Workload
from ..workloads.ulysses import UlyssesWorkload

# Rows to send, buffer for what comes, rows to each rank, rows from each rank.
Way = tuple[Tensor, Tensor, list[int], list[int]]


class Floor(Protocol):
    """``backward`` takes what ``forward`` gave."""

    def forward(self) -> Any: ...

    def backward(self, out: Any) -> object: ...


class BareExchange:
    """Rows there and back in forward, there and back again in backward; nothing is gathered, copied or summed."""

    def __init__(self, there: Way, back: Way, group: dist.ProcessGroup) -> None:
        self.ways, self.group = (there, back), group

    def forward(self) -> None:
        self._move(self.ways)

    def backward(self, out: None) -> None:
        """The gradient of ``back`` takes the way of ``there``, and the other way round: the same two calls."""
        self._move(self.ways)

    def _move(self, ways: Sequence[Way]) -> None:
        for rows, out, sent, received in ways:
            dist.all_to_all_single(out, rows, received, sent, group=self.group)


class PlannedExchange(BareExchange):
    """The same, after an exchange of what a plan sends, forward."""

    def __init__(self, plan: Way, there: Way, back: Way, group: dist.ProcessGroup) -> None:
        super().__init__(there, back, group)
        self.plan = plan

    def forward(self) -> None:
        self._move((self.plan, *self.ways))


class BareAttention:
    """The default ``attend``, of this rank's heads, on whole sequences that it has already."""

    def __init__(self, workload: AttentionWorkload, group: dist.ProcessGroup) -> None:
        heads, rank = workload.heads, group.rank()
        mine = slice(heads.offsets[rank], heads.offsets[rank] + heads.sizes[rank])
        kv_of_head = [head // (heads.total // workload.num_kv) for head in range(heads.total)][mine]
        needed = sorted(set(kv_of_head))
        if sorted(needed * (len(kv_of_head) // max(len(needed), 1))) != kv_of_head:  # a group straddles ranks
            needed = kv_of_head
        q_BLNH, k_BLGH, v_BLGH, grad_BLNH = workload.whole
        inputs = (q_BLNH[:, :, mine], k_BLGH[:, :, needed], v_BLGH[:, :, needed])
        self.leaves = tuple(x.contiguous().requires_grad_() for x in inputs)
        self.grad_BLnH, self.options = grad_BLNH[:, :, mine].contiguous(), workload.options

    def forward(self) -> Tensor:
        if not self.grad_BLnH.numel():  # a rank without heads
            return self.leaves[0] * 1
        return scaled_dot_product(*self.leaves, **self.options)

    def backward(self, out: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(out, self.leaves, self.grad_BLnH, allow_unused=True)


def floors_of(workload: Workload, group: dist.ProcessGroup) -> dict[str, Floor]:
    """Name -> floor, the one that ratios are taken against first."""
    if isinstance(workload, AttentionWorkload):
        return {"floor": BareAttention(workload, group)}
    if isinstance(workload, UlyssesWorkload):
        return {"floor": _ulysses_floor(workload, group)}
    by_rank, by_choice = (BareExchange(*_ways(workload, group, once=once), group) for once in (True, False))
    planned = PlannedExchange(_way_of_ids(workload, group), *by_rank.ways, group)
    return {"rank floor": by_rank, "planned floor": planned, "choice floor": by_choice}


def rows_between(workload: DispatchWorkload, *, once: bool) -> list[list[int]]:
    """[source][destination] rows: one per choice, or with ``once`` one per distinct (token, rank)."""
    ranks, counts = len(workload.experts), []
    for source in range(ranks):
        rank_tK = workload.experts.owner(workload.choices(source))
        if once:
            rank_tK = torch.zeros(len(rank_tK), ranks, dtype=torch.bool).scatter_(1, rank_tK, True).nonzero()[:, 1]
        counts.append(rank_tK.flatten().bincount(minlength=ranks).tolist())
    return counts


def _ways(workload: DispatchWorkload, group: dist.ProcessGroup, *, once: bool) -> tuple[Way, Way]:
    """There and back."""
    counts, rank = rows_between(workload, once=once), group.rank()
    sent, received = counts[rank], [row[rank] for row in counts]
    here_SD, there_RD = (torch.ones(sum(n), workload.dim, dtype=workload.dtype) for n in (sent, received))
    return (here_SD, there_RD, sent, received), (there_RD, here_SD, received, sent)


def _way_of_ids(workload: DispatchWorkload, group: dist.ProcessGroup) -> Way:
    """The ids of every rank to every rank, as a plan by ids sends them."""
    id_format, sizes = IdFormat.of(workload.top_k, workload.experts.total), workload.sharding.local_sizes
    received = [id_format.message_steps(tokens) for tokens in sizes]
    sent = [received[group.rank()]] * len(sizes)
    here, there = (torch.ones(sum(steps), dtype=STEP) for steps in (sent, received))
    return here, there, sent, received


def _ulysses_floor(workload: UlyssesWorkload, group: dist.ProcessGroup) -> BareExchange:
    """Exactly the elements of q, and of the k and v heads that each rank needs; then those of the output."""
    rank, tokens = group.rank(), workload.sharding.local_sizes
    query, kv = workload.heads.sizes, workload.kv_needed
    width = [(query[to] + 2 * kv[to]) * workload.head_dim for to in range(len(query))]

    def buffer(elements: Sequence[int]) -> Tensor:
        return torch.ones(sum(elements), dtype=workload.dtype)

    sent, received = [tokens[rank] * w for w in width], [t * width[rank] for t in tokens]
    home = [t * query[rank] * workload.head_dim for t in tokens]
    arriving = [tokens[rank] * n * workload.head_dim for n in query]
    return BareExchange(
        (buffer(sent), buffer(received), sent, received), (buffer(home), buffer(arriving), home, arriving), group
    )
