"""Runs of places against sets of them, which share no code."""

import random

import pytest

from sp_attention.work.runs import Rows, Run, common, count, in_blocks, union, without

pytestmark = pytest.mark.usefixtures("uncovered")


def drawn_runs(draw: random.Random, length: int) -> list[Run]:
    """Disjoint runs in any order; some are empty, some touch."""
    marks = sorted(draw.randrange(length + 1) for _ in range(2 * draw.randrange(6)))
    runs = [(marks[i], marks[i + 1]) for i in range(0, len(marks), 2)]
    return draw.sample(runs, len(runs))


def places(runs: list[Run] | tuple[Run, ...]) -> list[int]:
    return [place for start, stop in runs for place in range(start, stop)]


@pytest.mark.parametrize("seed", range(80))
def test_sets_of_places(seed: int) -> None:
    draw = random.Random(seed)
    some, others = drawn_runs(draw, 20), drawn_runs(draw, 20)
    assert places(union(some)) == sorted(set(places(some)))
    assert all(a[1] < b[0] for a, b in zip(union(some), union(some)[1:], strict=False))
    ascending = [sorted(runs) for runs in (some, others)]
    assert places(common(*ascending)) == sorted(set(places(some)) & set(places(others)))
    assert places(without(*ascending)) == sorted(set(places(some)) - set(places(others)))
    assert count(some) == len(places(some))
    most = draw.randrange(1, 7)
    blocks = in_blocks(some, most)
    assert [place for block in blocks for place in places(block)] == places(some)
    assert all(count(block) == most for block in blocks[:-1])
    assert all(0 < count(block) <= most for block in blocks[-1:])


@pytest.mark.parametrize("seed", range(40))
def test_where_places_are_in_a_tensor(seed: int) -> None:
    draw = random.Random(seed)
    runs, wanted = drawn_runs(draw, 20), union(drawn_runs(draw, 20))
    rows, tensor = Rows(runs), places(runs)
    assert rows.size == len(tensor)
    found = [(place + i, row + i) for place, row, size in rows.spans(wanted) for i in range(size)]
    assert found == [(place, tensor.index(place)) for place in sorted(set(tensor) & set(places(wanted)))]
