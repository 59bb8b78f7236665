"""Who computes what, and which rows it needs of whom. Ints only, and the same on every rank: nothing is asked of
anybody."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

from ..blocks.pieces import Piece
from ..wire.heads import GroupedHeads
from .runs import Rows, Runs, common, in_blocks, union, without
from .scheme import Keys, Scheme, head_rank, team
from .seen import Seen


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """The work of a call, over all ranks of its group.

    Attributes:
        scheme: how it is spread.
        held, kv_held: the runs of queries and of keys that each rank holds, in the order of its tensors.
        seen: which keys a query sees.
        heads: over the ranks of a team.
        at_once: whether every query meets all its keys in one turn, as an ``attend`` of the caller's needs.
    """

    scheme: Scheme
    held: tuple[Runs, ...]
    kv_held: tuple[Runs, ...]
    seen: Seen
    heads: GroupedHeads
    at_once: bool

    @property
    def ranks(self) -> int:
        return len(self.held)

    @property
    def team_size(self) -> int:
        return len(self.heads.query)

    @property
    def teams(self) -> range:
        return range(self.ranks // self.team_size)

    def team(self, rank: int) -> int:
        return team(rank, self.team_size)

    def head_rank(self, rank: int) -> int:
        return head_rank(rank, self.team_size)

    def members(self, team: int) -> range:
        return range(team * self.team_size, (team + 1) * self.team_size)

    @cached_property
    def queries(self) -> tuple[Runs, ...]:
        """Those that each team computes: as its tensor has them where it is one rank, else ascending."""
        if self.team_size == 1:
            return self.held
        return tuple(union(run for rank in self.members(team) for run in self.held[rank]) for team in self.teams)

    @cached_property
    def keys_held(self) -> tuple[Runs, ...]:
        """Those that each team holds, ascending."""
        return tuple(union(run for rank in self.members(team) for run in self.kv_held[rank]) for team in self.teams)

    @cached_property
    def needed(self) -> tuple[Runs, ...]:
        """The keys that some query of each team sees, ascending."""
        return tuple(self.seen.needed(queries) for queries in self.queries)

    @cached_property
    def query_turns(self) -> tuple[tuple[Runs, ...], ...]:
        """For each turn, the queries that each team gets. One rank alone has its own at once.

        Ring keys come to all queries in turn, so those are not cut.
        """
        if self.at_once or self.team_size == 1 or self.scheme.keys is Keys.RING:
            return (self.queries,)
        return _cut(self.queries, self.scheme.chunk) or (self.queries,)

    @cached_property
    def key_turns(self) -> tuple[tuple[Runs, ...], ...]:
        """For each turn, the keys that each team gets. Turns in which nobody needs any are left out, but the first:
        in it one rank alone has its own."""
        if self.at_once:
            return (self.needed,)
        if self.team_size > 1 and self.scheme.keys is Keys.GATHER:
            return _cut(self.needed, self.scheme.chunk) or (self.needed,)
        pairs = tuple(zip(self.needed, self.keys_held, strict=True))
        own = tuple(common(needed, held) for needed, held in pairs)
        if self.scheme.keys is Keys.RING:
            others = [self._of_distance(distance) for distance in self.teams[1:]]
        else:
            others = [tuple(without(needed, held) for needed, held in pairs)]
        first = (own,) if self.team_size == 1 else _cut(own, self.scheme.chunk) or (own,)
        return (*first, *(part for turn in others for part in _cut(turn, self.scheme.chunk)))

    def _of_distance(self, distance: int) -> tuple[Runs, ...]:
        """The keys that each team needs of the team so far before it."""
        return tuple(
            common(self.needed[team], self.keys_held[(team - distance) % len(self.teams)]) for team in self.teams
        )

    def of_rank(self, rank: int) -> "RankWork":
        """What one rank does."""
        alone = self.team_size == 1
        queries = [self._turn(rank, self.held, wanted, alone, within_team=True) for wanted in self.query_turns]
        keys = [
            self._turn(rank, self.kv_held, wanted, alone and not i and not self.at_once, within_team=False)
            for i, wanted in enumerate(self.key_turns)
        ]
        return RankWork(
            rank=rank,
            work=self,
            query_turns=tuple(queries),
            key_turns=tuple(keys),
            pieces=tuple(tuple(tuple(self.seen.pieces(q.rows, k.rows)) for k in keys) for q in queries),
        )

    def _turn(
        self, rank: int, held: Sequence[Runs], wanted: Sequence[Runs], is_home: bool, within_team: bool
    ) -> "Turn":
        """A turn as one rank sees it.

        Args:
            held: what each rank holds.
            wanted: what each team gets.
            is_home: whether each rank has its own, as they are.
            within_team: whether only the ranks of a team send to each other. They hold all that it wants.
        """
        nothing = ((),) * self.ranks
        if is_home:
            return Turn(rows=Rows(held[rank]), sent=nothing, came=nothing, travels=False, is_home=True)

        def sent(source: int, to: int) -> Runs:
            if within_team and self.team(source) != self.team(to):
                return ()
            return units(held[source], wanted[self.team(to)])

        return Turn(
            rows=Rows(wanted[self.team(rank)]),
            sent=tuple(sent(rank, to) for to in range(self.ranks)),
            came=tuple(sent(source, rank) for source in range(self.ranks)),
            travels=self.ranks > 1 and any(wanted),
            is_home=False,
        )

    def query_heads(self, rank: int) -> tuple[int, int]:
        """The first query head of a rank, and how many."""
        i = self.head_rank(rank)
        return self.heads.query.offsets[i], self.heads.query.sizes[i]

    def kv_heads(self, rank: int) -> tuple[int, int]:
        """The first key/value head of a rank, and how many."""
        needed = self.heads.kv_ranges[self.head_rank(rank)]
        return needed.start, len(needed)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn:
    """Rows that one rank gets at once, and those that it sends.

    Attributes:
        rows: those that this rank has then.
        sent: of what this rank holds, the runs that each rank gets; see :func:`units`.
        came: of what each rank holds, the runs that this rank gets.
        travels: whether some rank sends something to another; the same on every rank.
        is_home: whether the rows are those of this rank's own tensor, as it is.
    """

    rows: Rows
    sent: tuple[Runs, ...]
    came: tuple[Runs, ...]
    travels: bool
    is_home: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankWork:
    """What one rank does.

    Attributes:
        rank, work: of which it is a part.
        query_turns, key_turns: all keys come while the first queries are there; the further queries meet them again.
        pieces: for each turn of queries, and each of keys, the pairs of rows that see each other.
    """

    rank: int
    work: Work
    query_turns: tuple[Turn, ...]
    key_turns: tuple[Turn, ...]
    pieces: tuple[tuple[tuple[Piece, ...], ...], ...]

    @property
    def head_rank(self) -> int:
        return self.work.head_rank(self.rank)


def units(held: Runs, wanted: Runs) -> Runs:
    """What is wanted of what a rank holds, in runs that are contiguous in its tensor and wherever they arrive: cut at
    its own runs, which the receiver may have side by side in another order. Ascending."""
    return common(sorted(run for run in held if run[0] < run[1]), wanted)


def _cut(wanted: Sequence[Runs], most: int) -> tuple[tuple[Runs, ...], ...]:
    """Of each team at most so many rows in a turn. No turns where nobody wants any."""
    blocks = [in_blocks(runs, most) for runs in wanted]
    return tuple(tuple(turn) for turn in zip_longest(*blocks, fillvalue=()))
