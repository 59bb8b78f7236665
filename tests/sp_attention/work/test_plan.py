"""The plan of every scheme, against loops over pairs of a query and a key: each pair that sees each other is computed
once, by rows that were there; and nobody gets a row that nobody there needs."""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pytest

from moe_dispatch import Partition
from sp_attention import Scheme
from sp_attention.blocks.pieces import Piece
from sp_attention.wire.heads import GroupedHeads
from sp_attention.work.parts import parts
from sp_attention.work.plan import RankWork, Turn, Work
from sp_attention.work.runs import Run, Runs
from sp_attention.work.seen import Seen
from tests.support.schemes import schemes

pytestmark = pytest.mark.usefixtures("uncovered")


@dataclass(frozen=True, slots=True)
class Drawn:
    """A work, and the same as sets: the pairs that see each other, and the places that each rank holds."""

    work: Work
    pairs: frozenset[tuple[int, int]]

    def places(self, rank: int) -> list[int]:
        return [place for run in self.work.held[rank] for place in range(*run)]


def held_by(ranks: int, length: int, draw: random.Random) -> tuple[Runs, ...]:
    marks = sorted({0, length, *(draw.randrange(length + 1) for _ in range(2 * ranks))})
    runs: list[list[Run]] = [[] for _ in range(ranks)]
    for run in draw.sample(list(pairwise(marks)), len(marks) - 1):
        runs[draw.randrange(ranks)].append(run)
    return tuple(tuple(of_rank) or ((0, 0),) for of_rank in runs)


def drawn(ranks: int, scheme: Scheme, seed: int) -> Drawn:
    draw = random.Random(seed)
    queries, keys = draw.choice([(13, 13), (13, 13), (17, 5), (4, 15), (1, 1)])
    sides = draw.choice([(-1, -1), (-1, 0), (3, 0), (2, 4), (-1, 2), (0, -1)])
    spans = [(0, queries, 0, keys)]
    if queries == keys and draw.random() < 0.5:
        marks = sorted(draw.randrange(queries + 1) for _ in range(6))
        spans = [(start, stop, start, stop) for start, stop in zip(marks[::2], marks[1::2], strict=True)]
    heads = GroupedHeads(Partition.balanced(6, scheme.team_size(ranks)), 3)
    work = Work(
        scheme=scheme,
        held=held_by(ranks, queries, draw),
        kv_held=held_by(ranks, keys, draw),
        seen=Seen(spans, sides),
        heads=heads,
        key_heads=heads.kv_spans,
        at_once=False,
    )
    left, right = sides
    pairs = {
        (query, key)
        for q0, q1, k0, k1 in spans
        for query in range(q0, q1)
        for key in range(k0, k1)
        if (left < 0 or key >= query + k1 - q1 - left) and (right < 0 or key <= query + k1 - q1 + right)
    }
    return Drawn(work, frozenset(pairs))


def row_places(turn: Turn) -> list[int]:
    return [place for run in turn.rows.runs for place in range(*run)]


def pairs_of(piece: Piece) -> list[tuple[int, int]]:
    """(row of queries, row of keys)."""
    return [
        (piece.q_row + i, piece.k_row + j)
        for i in range(piece.queries)
        for j in range(piece.keys)
        if piece.low <= j - i <= piece.high
    ]


def computed(mine: RankWork) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for queries, of_queries in zip(mine.query_turns, mine.pieces, strict=True):
        for keys, pieces in zip(mine.key_turns, of_queries, strict=True):
            q_place, k_place = row_places(queries), row_places(keys)
            for piece in pieces:
                assert (q_place[piece.q_row], k_place[piece.k_row]) == (piece.q_place, piece.k_place)
                found.update((q_place[q], k_place[k]) for q, k in pairs_of(piece))
    return found


CASES = [
    pytest.param(ranks, scheme, id=f"{ranks} {scheme}") for ranks in (1, 2, 3, 4, 6) for scheme in schemes(ranks)
]


@pytest.mark.parametrize(("ranks", "scheme"), CASES)
def test_each_pair_is_computed_once_by_each_rank_of_its_team(ranks: int, scheme: Scheme) -> None:
    for seed in range(8):
        case = drawn(ranks, scheme, seed)
        team_size = scheme.team_size(ranks)
        for i in range(team_size):
            total: Counter[tuple[int, int]] = Counter()
            for rank in range(i, ranks, team_size):
                total += computed(case.work.of_rank(rank))
            assert total == Counter(case.pairs)


@pytest.mark.parametrize(("ranks", "scheme"), CASES)
def test_rows_come_once_to_whom_they_are_needed(ranks: int, scheme: Scheme) -> None:
    """Who sends what to whom is the same on both sides, and is what the turn's tensor has."""
    for seed in range(8):
        work, pairs = (case := drawn(ranks, scheme, seed)).work, case.pairs
        everyone = [work.of_rank(rank) for rank in range(ranks)]
        for rank, mine in enumerate(everyone):
            team = work.members(work.team(rank))
            queries = {place for peer in team for place in case.places(peer)}
            got: Counter[int] = Counter()
            for i, turn in enumerate(mine.key_turns):
                for peer, other in enumerate(everyone):
                    assert turn.came[peer] == other.key_turns[i].sent[rank]
                if not turn.is_home:
                    came = sorted(place for runs in turn.came for run in runs for place in range(*run))
                    assert came == sorted(row_places(turn))
                    got.update(came)
                    assert turn.rows.size <= scheme.chunk
                    anybody = any(other.key_turns[i].rows.size for other in everyone)
                    assert turn.travels == (ranks > 1 and anybody)
            needed = {key for query, key in pairs if query in queries}
            own = {place for run in work.kv_held[rank] for place in range(*run)}
            assert got == Counter(needed - own if mine.key_turns[0].is_home else needed)
            asked = sorted(place for turn in mine.query_turns for place in row_places(turn))
            assert asked == sorted(queries)


def test_a_turn_that_nobody_needs_is_left_out() -> None:
    """A window of two keys reaches the rank before and no other, so a ring of 8 has 2 turns: its own, and one."""
    held = tuple(((8 * rank, 8 * rank + 8),) for rank in range(8))
    seen, heads = Seen([(0, 64, 0, 64)], (2, 0)), GroupedHeads(Partition((4,)), 2)
    work = Work(
        scheme=Scheme.ring(),
        held=held,
        kv_held=held,
        seen=seen,
        heads=heads,
        key_heads=heads.kv_spans,
        at_once=False,
    )
    assert len(work.key_turns) == 2
    assert tuple(map(work.key_turns[1].of, work.teams)) == (
        (),
        *(((8 * rank - 2, 8 * rank),) for rank in range(1, 8)),
    )


@pytest.mark.parametrize("seed", range(60))
def test_how_many_pairs(seed: int) -> None:
    case = drawn(1, Scheme.gather(), seed)
    for start, stop in ((0, 17), (2, 9), (5, 6), (7, 7)):
        wanted = sum(start <= query < stop for query, _ in case.pairs)
        assert case.work.seen.pairs([(start, stop)]) == wanted


@pytest.mark.parametrize("seed", range(40))
def test_parts_for_an_attend_of_the_callers(seed: int) -> None:
    """Each has consecutive queries, all keys that they see, and where these end beside the last query's own."""
    case = drawn(3, Scheme.gather(), seed)
    work = Work(
        scheme=Scheme.gather(),
        held=case.work.held,
        kv_held=case.work.kv_held,
        seen=case.work.seen,
        heads=case.work.heads,
        key_heads=case.work.key_heads,
        at_once=True,
    )
    found: Counter[tuple[int, int]] = Counter()
    left, right = work.seen.sides
    for rank in range(3):
        mine = work.of_rank(rank)
        (queries,), (keys,) = mine.query_turns, mine.key_turns
        q_place, k_place, at = row_places(queries), row_places(keys), 0
        for part in parts(work.seen, queries.rows, keys.rows):
            assert part.q_row >= at
            size = part.queries[1] - part.queries[0]
            at = part.q_row + size
            assert q_place[part.q_row : at] == list(range(*part.queries))
            assert k_place[part.k_row :][: part.keys[1] - part.keys[0]] == list(range(*part.keys))
            last_own = part.keys[1] - 1 - part.beyond
            found.update(
                (query, key)
                for i, query in enumerate(range(*part.queries))
                for key in range(*part.keys)
                if (left < 0 or key >= last_own - (size - 1 - i) - left)
                and (right < 0 or key <= last_own - (size - 1 - i) + right)
            )
    assert found == Counter(case.pairs)
