"""Who computes what, and which rows it needs of whom. Ints only, and the same on every rank: nothing is asked of
anybody."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

from ..blocks.pieces import Piece
from ..wire.heads import GroupedHeads
from .runs import Rows, Runs, common, count, union, without
from .scheme import Keys, Scheme, head_rank, team
from .seen import Seen
from .turns import Holders, Wanted


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """The work of a call, over all ranks of its group.

    Attributes:
        scheme: how it is spread.
        held, kv_held: the runs of queries and of keys that each rank holds, in the order of its tensors.
        seen: which keys a query sees.
        heads: over the ranks of a team.
        key_heads: for each of them, the first head that it gets of what travels for keys, and how many.
        at_once: whether every query meets all its keys in one turn, as an ``attend`` of the caller's needs.
    """

    scheme: Scheme
    held: tuple[Runs, ...]
    kv_held: tuple[Runs, ...]
    seen: Seen
    heads: GroupedHeads
    key_heads: tuple[tuple[int, int], ...]
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
    def holders(self) -> tuple[Holders, Holders]:
        """Of queries, and of keys."""
        return Holders(self.held), Holders(self.kv_held)

    @cached_property
    def query_turns(self) -> tuple[Wanted, ...]:
        """For each turn, the queries that each team gets. One rank alone has its own at once.

        Ring keys come to all queries in turn, so those are not cut.
        """
        queries = self._wanted(self.queries.__getitem__, self._itself)
        if self.at_once or self.queries_stay or self.scheme.keys is Keys.RING:
            return (queries,)
        return tuple(queries.cut(self.scheme.chunk)) or (queries,)

    @cached_property
    def key_turns(self) -> tuple[Wanted, ...]:
        """For each turn, the keys that each team gets. Turns in which nobody needs any are left out, but the first:
        in it one rank alone has its own."""
        chunk, needed = self.scheme.chunk, self._wanted(self.needed.__getitem__, self._all_teams)
        if self.at_once:
            return (needed,)
        if self.team_size > 1 and self.scheme.keys is Keys.GATHER:
            return tuple(needed.cut(chunk)) or (needed,)
        own = self._wanted(partial(self._of_distance, 0), self._itself)
        if self.scheme.keys is Keys.RING:
            others = [
                self._wanted(partial(self._of_distance, distance), partial(self._after, distance))
                for distance in self.teams[1:]
            ]
        else:
            others = [self._wanted(self._of_others, self._all_teams)]
        first = [own] if self.team_size == 1 else own.cut(chunk) or [own]
        return (*first, *(part for turn in others for part in turn.cut(chunk)))

    @property
    def queries_stay(self) -> bool:
        """Whether each rank has its own queries, as they are."""
        return self.team_size == 1

    def keys_stay(self, turn: int) -> bool:
        """Whether each rank has its own keys in this turn, as they are."""
        return self.team_size == 1 and turn == 0 and not self.at_once

    def travels(self, wanted: Wanted, stays: bool) -> bool:
        """Whether a turn is a collective: the same on every rank."""
        return not stays and self.ranks > 1 and not wanted.is_empty

    def _wanted(self, of: Callable[[int], Runs], receivers: Callable[[int], range]) -> Wanted:
        return Wanted(self.teams, of, receivers, self._most)

    @cached_property
    def _most(self) -> int:
        """Rows of the longest of all turns, or more."""
        if self.scheme.keys is Keys.RING:
            return max(map(count, (*self.keys_held, *self.queries)))
        return max(map(count, (*self.needed, *self.queries)))

    def _of_distance(self, distance: int, team: int) -> Runs:
        """The keys that a team needs of the team so far before it."""
        return common(self.needed[team], self.keys_held[(team - distance) % len(self.teams)])

    def _of_others(self, team: int) -> Runs:
        return without(self.needed[team], self.keys_held[team])

    def _after(self, distance: int, team: int) -> range:
        other = (team + distance) % len(self.teams)
        return range(other, other + 1)

    def _itself(self, team: int) -> range:
        return range(team, team + 1)

    def _all_teams(self, team: int) -> range:
        return self.teams

    def of_rank(self, rank: int) -> "RankWork":
        """What one rank does."""
        queries = [self._turn(rank, 0, wanted, self.queries_stay) for wanted in self.query_turns]
        keys = [self._turn(rank, 1, wanted, self.keys_stay(i)) for i, wanted in enumerate(self.key_turns)]
        return RankWork(
            rank=rank,
            work=self,
            query_turns=tuple(queries),
            key_turns=tuple(keys),
            pieces=tuple(tuple(tuple(self.seen.pieces(q.rows, k.rows)) for k in keys) for q in queries),
        )

    def _turn(self, rank: int, side: int, wanted: Wanted, is_home: bool) -> "Turn":
        """A turn as one rank sees it.

        Args:
            side: 0 for queries, 1 for keys.
            wanted: what each team gets.
            is_home: whether each rank has its own, as they are.
        """
        holders, held = self.holders[side], (self.held, self.kv_held)[side]
        came: list[Runs] = [()] * self.ranks
        sent: list[Runs] = [()] * self.ranks
        if not is_home:
            for source, units in holders.of_all(wanted.of(self.team(rank))).items():
                came[source] = tuple(units)
            for team in wanted.receivers(self.team(rank)):
                units = holders.units(rank, wanted.of(team))
                for to in self.members(team):
                    sent[to] = units
        return Turn(
            rows=Rows(held[rank] if is_home else wanted.of(self.team(rank))),
            sent=tuple(sent),
            came=tuple(came),
            travels=self.travels(wanted, is_home),
            is_home=is_home,
        )

    def query_heads(self, rank: int) -> tuple[int, int]:
        """The first query head of a rank, and how many."""
        i = self.head_rank(rank)
        return self.heads.query.offsets[i], self.heads.query.sizes[i]

    def key_heads_of(self, rank: int) -> tuple[int, int]:
        """The first head that a rank gets of what travels for keys, and how many."""
        return self.key_heads[self.head_rank(rank)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn:
    """Rows that one rank gets at once, and those that it sends.

    Attributes:
        rows: those that this rank has then.
        sent: of what this rank holds, the runs that each rank gets; see :meth:`Holders.units`.
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
