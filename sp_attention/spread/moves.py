"""Rows of one rank's tensors to where the work on them is, and back.

The way back is the adjoint of the way there: what went to several ranks comes back as the sum of theirs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch.internals import FinishedExchange

from ..wire.boxes import Box, Joins, Parts, to_add, to_fill, to_read
from ..wire.tensors import Cut, TensorsOnTheWay, start_tensors
from ..work.plan import RankWork, Turn
from ..work.runs import Rows, Runs
from .waiting import away, back

Tensors = Sequence[Tensor]
Heads = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Side:
    """Queries, or keys and values.

    Attributes:
        home: where places are in this rank's own tensors.
        turns: see :class:`RankWork`.
        heads: the first head that each rank works on, and how many.
    """

    home: Rows
    turns: tuple[Turn, ...]
    heads: tuple[Heads, ...]


class Part(NamedTuple):
    """Of one turn, what goes home.

    Attributes:
        side, turn: which turn.
        tensors: (B, rows, my heads, width) of this rank's work.
        homes: (B, l, all heads, width) of this rank's own rows; for each of ``tensors``.
    """

    side: Side
    turn: int
    tensors: Tensors
    homes: Tensors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrived:
    """What one turn of keys and one of queries work on.

    Attributes:
        query_turn, key_turn: their numbers.
        queries, keys: tensors (B, rows, my heads, width), as many as were sent of each.
    """

    query_turn: int
    key_turn: int
    queries: Tensors
    keys: Tensors


class Moves:
    """The exchanges of one rank.

    Args:
        mine: what it does.
        group: of all ranks of the work.
    """

    def __init__(self, mine: RankWork, group: dist.ProcessGroup) -> None:
        work, ranks = mine.work, range(mine.work.ranks)
        self.mine, self.group = mine, group
        self.queries = Side(
            home=Rows(work.held[mine.rank]),
            turns=mine.query_turns,
            heads=tuple(work.query_heads(rank) for rank in ranks),
        )
        self.keys = Side(
            home=Rows(work.kv_held[mine.rank]),
            turns=mine.key_turns,
            heads=tuple(work.key_heads_of(rank) for rank in ranks),
        )

    def arrivals(self, queries: Tensors, keys: Tensors) -> Iterator[Arrived]:
        """Every turn of queries with every turn of keys. What comes next is on its way while the caller works.

        One collective for each turn in which something travels. All ranks of the group go through all of it.

        Args:
            queries, keys: this rank's tensors, (B, l, all heads, width) of one dtype; any number of each.
        """
        turns = list(product(range(len(self.queries.turns)), range(len(self.keys.turns))))
        coming = self._start(turns[0], queries, keys)
        held: dict[int, list[tuple[Tensor, torch.device]]] = {}
        now_queries: Tensors = ()
        for following, (i, j) in zip([*turns[1:], None], turns, strict=True):
            came = coming.wait()
            if following is not None:
                coming = self._start(following, queries, keys)
            if j == 0:
                now_queries = came.pop(0)
            now_keys = came.pop(0) if i == 0 else [back(x, device) for x, device in held[j]]
            if i == 0 and len(self.queries.turns) > 1:
                held[j] = [(away(x, self.mine.work.scheme.offload), x.device) for x in now_keys]
            yield Arrived(query_turn=i, key_turn=j, queries=now_queries, keys=now_keys)

    def _start(self, turns: tuple[int, int], queries: Tensors, keys: Tensors) -> "Coming":
        """The way there of the queries of a turn with the first keys, and of the keys of a turn with the first
        queries."""
        i, j = turns
        parts = [(self.queries, i, queries)] * (j == 0) + [(self.keys, j, keys)] * (i == 0)
        sent, received, outs, travels = Cutting(), Cutting(), list[Tensors](), False
        for side, turn_number, tensors in parts:
            turn, (_, num_heads) = side.turns[turn_number], side.heads[self.mine.rank]
            if turn.is_home:
                outs.append(tensors)
                continue
            out = [x.new_empty(x.shape[0], turn.rows.size, num_heads, x.shape[3]) for x in tensors]
            sent.add(tensors, side.home, turn.sent, side.heads)
            received.add(out, turn.rows, turn.came, [(0, num_heads)] * len(turn.came))
            outs.append(out)
            travels |= turn.travels and bool(tensors)
        cuts = sent.cut(self.mine.rank, to_read), received.cut(self.mine.rank, to_fill)
        return Coming(self._on_the_way(*cuts, travels, [*queries, *keys][0]), outs)

    def start_home(self, parts: "Sequence[Part]") -> TensorsOnTheWay:
        """The way home, of at least one part: to fill ``homes`` or add to them once it is there. One collective where
        something travels."""
        sent, received, travels = Cutting(), Cutting(), False
        for side, turn_number, tensors, homes in parts:
            turn, (_, num_heads) = side.turns[turn_number], side.heads[self.mine.rank]
            sent.add(tensors, turn.rows, turn.came, [(0, num_heads)] * len(turn.came))
            received.add(homes, side.home, turn.sent, side.heads)
            travels |= turn.travels
        cuts = sent.cut(self.mine.rank, to_read), received.cut(self.mine.rank, to_add)
        return self._on_the_way(*cuts, travels, parts[0].tensors[0])

    def _on_the_way(self, sent: Cut, received: Cut, travels: bool, like: Tensor) -> TensorsOnTheWay:
        if travels:
            return start_tensors(sent, received, self.group)
        return TensorsOnTheWay(sent, received, FinishedExchange(like.new_empty(0)))


@dataclass(frozen=True, slots=True, eq=False)
class Coming:
    """Tensors of a turn on their way there."""

    way: TensorsOnTheWay
    outs: list[Tensors]

    def wait(self) -> list[Tensors]:
        self.way.fill()
        return list(self.outs)


class Cutting:
    """Tensors, and their boxes of each rank."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.boxes: list[list[list[Box]]] = []

    def add(self, tensors: Tensors, rows: Rows, wanted: Sequence[Runs], heads: Sequence[Heads]) -> None:
        """Tensors whose rows those are, cut into the runs and heads of each rank. Each run is in one piece there."""
        boxes = [
            [Box(row, size, *of_rank) for _, row, size in rows.spans(runs)]
            for runs, of_rank in zip(wanted, heads, strict=True)
        ]
        self.tensors += tensors
        self.boxes += [boxes] * len(tensors)

    def cut(self, rank: int, joins: Joins) -> Cut:
        """What was added, for this rank; see :class:`Parts`."""
        return Cut(self.tensors, Parts.of(rank, [1] * len(self.tensors), self.boxes, joins))
