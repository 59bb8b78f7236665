"""The plan of one dispatch: integers only, made once, replayed as often as needed.

Four numberings meet here. *Sent* rows: one per distinct (token of mine, rank that needs it), by rank, then token.
*Received* rows: the same seen from the other side, by source rank, then token. In both, what a rank sends to itself
comes last: it stays here. *Rows*: one per choice that fell on an expert of mine, by expert, then global token, then
choice. *Entries*: the terms of a sum, so that every sum runs over consecutive entries.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.partition import Partition
from ..layout.sharding import TokenSharding
from ..wire.agreement import BAD, Statement
from .checks import check_plan, problem_of_arguments, problem_of_values, status_word
from .group_tokens import Grid
from .ids_exchange import RoutingExchange
from .row_index import Arrivals, Departures


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchMetadata:
    """Where every row of one dispatch comes from and goes to. Made by :func:`plan_dispatch`; holds no activation.

    Letters: t tokens of this rank, S rows it sends, R rows it receives, M rows of its experts, e its experts. All
    tensors are int64 on the device of the ids.

    Attributes:
        local_shape: (b, l, D), or (l, b, D) for order "LB": the shape of this rank's tokens.
        sharding: who holds which token, uneven offsets included.
        experts: who holds which expert.
        rank: this rank in ``group``.
        group: the expert-parallel process group.
        rows_sent: rows for each rank, one per distinct (token, rank).
        rows_received: rows from each rank.
        expert_BlK: the ids that the plan was made from. A plan made from them again equals this one.
        rows_per_expert_e: how many rows each of this rank's experts got.
        token_of_row_M: global token of each row.
        received_of_row_M: received row that each row is a copy of.
        choice_of_row_M: which of its token's K choices each row is.
        token_of_sent_S: local token of each sent row.
        sent_of_entry_S, first_entry_t: the sent rows of local token i are those of the entries from
            ``first_entry_t[i]`` on.
        row_of_entry_M, first_entry_R: the rows of received row i are those of the entries from ``first_entry_R[i]``
            on.
    """

    local_shape: tuple[int, int, int]
    sharding: TokenSharding
    experts: Partition
    rank: int
    group: dist.ProcessGroup
    rows_sent: tuple[int, ...]
    rows_received: tuple[int, ...]
    expert_BlK: Tensor
    rows_per_expert_e: Tensor
    token_of_row_M: Tensor
    received_of_row_M: Tensor
    choice_of_row_M: Tensor
    token_of_sent_S: Tensor
    sent_of_entry_S: Tensor
    first_entry_t: Tensor
    row_of_entry_M: Tensor
    first_entry_R: Tensor

    @property
    def rows_away(self) -> tuple[int, ...]:
        """Rows for each other rank."""
        return _without(self.rows_sent, self.rank)

    @property
    def rows_from_others(self) -> tuple[int, ...]:
        """Rows from each other rank."""
        return _without(self.rows_received, self.rank)

    @property
    def num_received(self) -> int:
        """Rows from all ranks."""
        return sum(self.rows_received)

    @property
    def num_tokens(self) -> int:
        """This rank's tokens."""
        return self.local_shape[0] * self.local_shape[1]

    @property
    def spare(self) -> int:
        """Rows of zeros to put behind those received, for a plan that has rows without a source."""
        return 0

    def checked(self, y_tD: Tensor) -> Tensor:
        """The sums of this rank's tokens, as they are: this plan was checked when it was made."""
        return y_tD

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DispatchMetadata):
            return NotImplemented
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.compare)
        return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]  # tensors compare by value, and they can be written to


@torch.no_grad()
def plan_dispatch(
    expert_BlK: Tensor,
    *,
    dim: int,
    sharding: TokenSharding,
    experts: Partition,
    group: dist.ProcessGroup,
    weight_BlK: Tensor | None = None,
    dtype: torch.dtype | None = None,
    facts: str = "",
    also: str = "",
) -> DispatchMetadata:
    """Plan which rows go where. One collective of known size, then one copy to the host: the only one of the layer.

    Args:
        expert_BlK: (b, l, K), or (l, b, K), int64: the experts of each of this rank's tokens. -1 means no expert; an
            expert named twice counts twice.
        dim: width D of the rows to move.
        sharding: the tokens that this group holds, one shard per rank, in the group's rank order.
        experts: the experts that each rank of the group holds.
        group: the expert-parallel process group.
        weight_BlK: routing weights to check along with the ids, if the caller has them already; the plan does not
            keep them. A NaN in them can be reported on every rank only here: later, ranks without a row of that token
            would not learn of it.
        dtype: of the rows to move, if the caller knows it already: ranks that differ in it are told so here, and
            break the backend later.
        facts: what the ranks have to agree on, as text, for a plan that is a part of a larger one; the arguments of
            this call where it is left out.
        also: what they have to agree on besides, as text.

    Raises:
        ValueError: the same text on every rank, naming the rank at fault: ids of the wrong dtype or shape or outside
            the experts, a NaN weight, or ranks that disagree about dim, dtype, experts, sharding or K. Raised after
            the routing exchange, and before any row moves; the group stays usable. A group of the wrong size is
            refused before any collective. Beliefs that change how much is sent (a shard of another size; a last
            dimension, of the weights or else of the ids, that as K takes more or fewer steps of 4 bytes) cannot be
            told this way: the backend fails, or waits.
    """
    check_plan(dim, sharding, experts, group)
    rank = group.rank()
    problem = problem_of_arguments(expert_BlK, weight_BlK, sharding, rank)
    if problem:
        # What the peers wait for is as long as K says; the weights may know it where the ids do not.
        known = [x for x in (weight_BlK, expert_BlK) if isinstance(x, Tensor) and x.ndim]
        refuse_plan(
            problem,
            num_choices=max(known[0].shape[-1], 1) if known else 1,
            device=known[0].device if known else torch.device("cpu"),
            dim=dim,
            sharding=sharding,
            experts=experts,
            group=group,
        )
    grid = Grid.of(
        sharding,
        experts,
        rank=rank,
        num_choices=expert_BlK.shape[2],
        dim=dim,
        device=expert_BlK.device,
        dtype=dtype,
        facts=facts,
        also=also,
    )
    wanted_tK = expert_BlK.flatten(0, 1) + 1
    id_tK = wanted_tK.clamp(0, experts.total)
    exchange = RoutingExchange.start(id_tK, status_word(wanted_tK, id_tK, weight_BlK, grid.expected), grid, group)
    departures = Departures.of(id_tK, grid)
    sent_P = departures.count_P
    id_GK, word_P = exchange.wait()
    arrivals = Arrivals.of(id_GK, grid)
    counts = (word_P, sent_P, arrivals.received_before_P1, arrivals.count_1)
    # The one copy to the host.
    words, sent, received_before, (num_rows,) = _split(torch.cat(counts).tolist(), map(len, counts))
    if set(words) != {grid.expected}:
        problem = problem_of_values(expert_BlK, weight_BlK, experts) if words[rank] == BAD else ""
        Statement(grid.facts, problem).raise_on_every_rank(device=expert_BlK.device, group=group)
    received = [after - before for before, after in pairwise(received_before)]
    return DispatchMetadata(
        local_shape=(*sharding.local_shape(rank), dim),
        sharding=sharding,
        experts=experts,
        rank=rank,
        group=group,
        rows_sent=grid.by_rank(sent),
        rows_received=grid.by_rank(received),
        expert_BlK=expert_BlK.clone(),
        **departures.index(sum(sent)),
        **arrivals.index(received_before[-1], num_rows),
    )


@torch.no_grad()
def refuse_plan(
    problem: str,
    *,
    num_choices: int,
    device: torch.device,
    dim: int,
    sharding: TokenSharding,
    experts: Partition,
    group: dist.ProcessGroup,
) -> None:
    """Take this rank's part in the routing exchange of a plan that it cannot make, and raise ``problem`` on every
    rank.

    For callers that find, before they have ids, that they cannot go on: their peers are in :func:`plan_dispatch`.
    """
    check_plan(dim, sharding, experts, group)
    rank = group.rank()
    grid = Grid.of(sharding, experts, rank=rank, num_choices=num_choices, dim=dim, device=device)
    word = torch.full((), BAD, dtype=torch.int64, device=device)
    none_tK = torch.zeros_like(word).expand(sharding.local_sizes[rank], num_choices)
    RoutingExchange.start(none_tK, word, grid, group).wait()
    Statement("", problem).raise_on_every_rank(device=device, group=group)


def _split(values: list[int], sizes: Iterable[int]) -> Iterator[tuple[int, ...]]:
    start = 0
    for size in sizes:
        yield tuple(values[start : start + size])
        start += size


def _without(counts: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (*counts[:rank], 0, *counts[rank + 1 :])
