"""What one rank has wrong is told to all: one text that names the rank, and a group that works after."""

import pytest

from moe_dispatch.testing import RankPool
from tests.support.attention.wrong.one_rank import ON_ONE_RANK, WINDOW
from tests.support.attention.wrong_calls import right_call, told, works

# ---- cases: what the ranks run -------------------------------------------------------------------------


def wrong_on_rank_1(rank: int, name: str) -> tuple[str, bool]:
    arguments = right_call(rank)
    if rank == 1:
        arguments |= ON_ONE_RANK[name][0](arguments)
    return told(arguments), works(rank)


def wrong_on_both(rank: int, name: str) -> tuple[str, bool]:
    arguments = right_call(rank)
    return told(arguments | ON_ONE_RANK[name][0](arguments)), works(rank)


def wrong_on_two(rank: int) -> tuple[str, bool]:
    arguments = right_call(rank)
    return told(arguments | {"window": (rank - 3, 0)}), works(rank)


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_one_ranks_mistake_is_told_to_all(rank_pool: RankPool, name: str) -> None:
    """Invariant 7."""
    assert rank_pool.run(wrong_on_rank_1, 2, name) == [(f"rank 1: {ON_ONE_RANK[name][1]}", True)] * 2


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_a_mistake_of_every_rank_is_told_to_all(rank_pool: RankPool, name: str) -> None:
    """Where all of them pass the same heads, say."""
    (text, usable), *others = rank_pool.run(wrong_on_both, 2, name)
    assert others == [(text, usable)]
    assert usable
    of_rank_0, of_rank_1 = text.split("; rank 1: ")
    assert of_rank_1 == ON_ONE_RANK[name][1]
    assert of_rank_0.startswith(f"rank 0: {of_rank_1[:5]}")


def test_two_mistakes_are_both_told(rank_pool: RankPool) -> None:
    text = "; ".join(f"rank {rank}: {WINDOW.format((rank - 3, 0))}" for rank in (0, 1))
    assert rank_pool.run(wrong_on_two, 2) == [(text, True)] * 2
