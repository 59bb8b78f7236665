"""What every rank sees is refused before any collective."""

import pytest

from moe_dispatch.testing import RankPool
from moe_dispatch.testing.counting import counting
from tests.support.attention.wrong.before import BEFORE
from tests.support.attention.wrong_calls import right_call, told

# ---- cases: what the ranks run -------------------------------------------------------------------------


def refused_before(rank: int, name: str) -> tuple[str, list[str]]:
    arguments = right_call(rank)
    with counting() as counts:
        text = told(arguments | BEFORE[name][0](arguments))
    return text, counts.collectives


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BEFORE)
def test_what_every_rank_sees_is_refused_before_any_collective(rank_pool: RankPool, name: str) -> None:
    """Invariant 12, where every rank has it."""
    assert rank_pool.run(refused_before, 2, name) == [(BEFORE[name][1], [])] * 2
