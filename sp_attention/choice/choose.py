"""Which scheme is cheapest for a call: every one that the group can have, counted from its plan."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.internals import check_count

from ..attend.documents import Documents
from ..attend.masks import sides_of
from ..wire.heads import GroupedHeads, heads_of_call
from ..work.kept import Asked, work_of
from ..work.scheme import NO_BOUND, Scheme
from ..work.traffic import Sizes
from .candidates import name_of, other_orders, schemes
from .cost import Machine, SchemeCost, cost_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeChoice:
    """What :func:`choose_scheme` found. ``print`` shows it as a table.

    Attributes:
        ranks: of the group.
        costs: of each scheme, the cheapest that fits the memory first; those that do not fit are last.
        limit_bytes: of memory, as given.
        orders: for other orders of the same tokens (``"contiguous"``, ``"zigzag"``, ``"balance"``) the cost of the
            scheme that is cheapest there.
    """

    ranks: int
    costs: tuple[SchemeCost, ...]
    limit_bytes: float
    orders: Mapping[str, SchemeCost]

    @property
    def best(self) -> Scheme:
        """The cheapest that fits."""
        return self.costs[0].scheme

    @property
    def why(self) -> str:
        """In a sentence or two, by how much it is cheaper than the next, and whether another order would be."""
        best, name = self.costs[0], name_of(self.best, self.ranks)
        told = f"{name} is cheapest: {_time(best)}"
        others = [each for each in self.costs[1:] if each.most_bytes <= self.limit_bytes]
        if others:
            told += f"; next is {name_of(others[0].scheme, self.ranks)}: {_time(others[0])}"
        if over := len(self.costs) - 1 - len(others):
            told += f"; {over} of {len(self.costs)} schemes need more than {self.limit_bytes / 1e6:.6g} MB"
        order = min(self.orders, key=lambda order: self.orders[order].milliseconds, default="")
        if order and (other := self.orders[order]).milliseconds < best.milliseconds:
            told += f". In {order} order {name_of(other.scheme, self.ranks)} takes {other.milliseconds:.4g} ms"
        return f"{told}."

    def __str__(self) -> str:
        head = f"{'scheme':28} {'ms':>9} {'MB fwd':>9} {'MB bwd':>9} {'in node':>9} {'between':>9} {'calls':>6}"
        lines = [f"{head} {'balance':>8} {'kept MB':>9} {'most MB':>9}"]
        rows = [("", each) for each in self.costs]
        rows += [(f"{order}: ", each) for order, each in self.orders.items()]
        for order, each in rows:
            sent = (each.forward_bytes, each.backward_bytes, each.intra_bytes, each.inter_bytes)
            lines.append(
                f"{order + name_of(each.scheme, self.ranks):28} {each.milliseconds:9.3g} "
                f"{' '.join(f'{number / 1e6:9.1f}' for number in sent)} {each.collectives:6} {each.balance:8.3f} "
                f"{each.kept_bytes / 1e6:9.1f} {each.most_bytes / 1e6:9.1f}"
            )
        return "\n".join((*lines, self.why))


def choose_scheme(
    sharding: TokenSharding,
    *,
    num_heads: tuple[int, int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    machine: Machine,
    kv_sharding: TokenSharding | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_padded: Tensor | None = None,
    own_attend: bool = False,
    chunk: int = NO_BOUND,
    limit_bytes: float = math.inf,
) -> SchemeChoice:
    """Compare all schemes of :func:`attention_over_ranks` for a call: Ulysses, and for every number of head ranks
    gathered keys, kept for backward or gathered again, and ring keys. No communication; nothing is run.

    All numbers are those of the call's own plan, so bytes are to the byte what it sends. The cheapest takes the least
    time: of every collective the slowest link, and then the work of the fullest rank. docs/planning.md derives where
    schemes cross.

    Args:
        sharding: which tokens each rank holds, in its order.
        num_heads: query heads N, and key/value heads G, which divide them.
        widths: H of queries and keys, Hv of values.
        dtype: of the tensors.
        machine: how fast its links and ranks are.
        kv_sharding, is_causal, window, cu_seqlens, cu_seqlens_padded: as of the call.
        own_attend: whether the call has an ``attend`` of the caller's, which takes no ring keys and no chunk.
        chunk: as of :class:`Scheme`, in all schemes.
        limit_bytes: the most memory of a rank beside the call's own tensors: ``SchemeCost.most_bytes``.

    Returns:
        All schemes with their costs, and for self-attention the cheapest in other orders of the same tokens.

    Raises:
        ValueError: numbers that cannot be, or no scheme that fits the memory.
    """
    call = Call.of(
        (sharding, sharding if kv_sharding is None else kv_sharding),
        num_heads,
        sides_of(is_causal, window),
        (cu_seqlens, cu_seqlens_padded),
        Sizes(
            batch=sharding.batch.total,
            query=widths[0],
            output=widths[1],
            keys=sum(widths),
            value_bytes=dtype.itemsize,
        ),
        own_attend,
    )
    if own_attend and chunk != NO_BOUND:
        raise ValueError(f"own_attend with chunk {chunk}: keys come in chunks; leave one of the two out")
    some = schemes(sharding.num_ranks, chunk=chunk, own_attend=own_attend)
    costs = call.costs(sharding, sharding if kv_sharding is None else kv_sharding, some, machine, limit_bytes)
    if costs[0].most_bytes > limit_bytes:
        least = min(costs, key=lambda each: each.most_bytes)
        raise ValueError(
            f"limit_bytes is {limit_bytes:.6g}, but the least of all schemes, "
            f"{name_of(least.scheme, sharding.num_ranks)}, needs {least.most_bytes}; give it more, or bound what is "
            f"in flight: chunk={_half_of(sharding, chunk)}"
        )
    orders = {} if kv_sharding is not None else other_orders(sharding, call.documents)
    found = {name: call.costs(order, order, some, machine, limit_bytes)[0] for name, order in orders.items()}
    return SchemeChoice(ranks=sharding.num_ranks, costs=costs, limit_bytes=limit_bytes, orders=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call, but for its order of tokens.

    Attributes:
        num_heads: of queries, and of keys and values.
        spans, sides: as of :class:`Seen`.
        sizes: of a row.
        own_attend: whether an ``attend`` of the caller's gets all keys at once.
    """

    num_heads: tuple[int, int]
    spans: tuple[tuple[int, int, int, int], ...]
    sides: tuple[int, int]
    sizes: Sizes
    own_attend: bool

    @classmethod
    def of(
        cls,
        shardings: tuple[TokenSharding, TokenSharding],
        num_heads: tuple[int, int],
        sides: tuple[int, int],
        cu_seqlens: tuple[Tensor | None, Tensor | None],
        sizes: Sizes,
        own_attend: bool,
    ) -> "Call":
        """ValueError for what cannot be."""
        queries, keys = shardings
        for each in shardings:
            each.check_whole("attention")
            if len(each.batch) != 1 or (each.num_ranks, each.batch) != (queries.num_ranks, queries.batch):
                raise ValueError(
                    f"queries are {queries}, keys and values {keys}; attention needs as many ranks for both, and a "
                    "batch that is not cut: batch=<its rows>, an int"
                )
        for name, numbers in (("num_heads", num_heads), ("widths", (sizes.query, sizes.output))):
            for number in numbers:
                check_count(number, name, least=1)
        heads_of_call(num_heads[0], (num_heads[1], num_heads[1]), None, 1)
        lengths = (queries.seq.total, keys.seq.total)
        documents, problem = Documents.read(*cu_seqlens, queries.batch.total, lengths)
        if problem:
            raise ValueError(problem)
        spans = ((0, lengths[0], 0, lengths[1]),)
        if documents is not None:
            spans = tuple((start, stop, start, stop) for start, stop in documents.spans)
        return cls(num_heads=num_heads, spans=spans, sides=sides, sizes=sizes, own_attend=own_attend)

    @property
    def documents(self) -> tuple[tuple[int, int], ...]:
        """The places of each; one of the whole sequence where there are none."""
        return tuple((start, stop) for start, stop, _, _ in self.spans)

    def costs(
        self,
        order: TokenSharding,
        kv_order: TokenSharding,
        some: Sequence[Scheme],
        machine: Machine,
        limit_bytes: float,
    ) -> tuple[SchemeCost, ...]:
        """Of some schemes: the cheapest that fits first, and last those that do not."""
        found = []
        for scheme in some:
            team = Partition.balanced(self.num_heads[0], scheme.team_size(order.num_ranks))
            heads = GroupedHeads(team, self.num_heads[1])
            asked = Asked(
                scheme=scheme,
                heads=heads,
                key_heads=heads.kv_spans,
                at_once=self.own_attend,
                kv_sharding=kv_order,
                spans=self.spans,
                sides=self.sides,
            )
            found.append(cost_of(work_of(order, asked), self.sizes, machine))
        return tuple(sorted(found, key=lambda each: (each.most_bytes > limit_bytes, each.milliseconds)))


def _time(cost: SchemeCost) -> str:
    return f"{cost.milliseconds:.4g} ms, {cost.work_ms:.4g} of them work"


def _half_of(sharding: TokenSharding, chunk: int) -> int:
    """A chunk that bounds more."""
    return max(min(chunk, max(sharding.local_sizes)) // 2, 1)
