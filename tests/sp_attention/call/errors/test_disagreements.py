"""Ranks that pass different options or shardings are told apart."""

from collections.abc import Callable

import pytest

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from tests.support.attention.wrong.disagreements import DISAGREEMENTS
from tests.support.attention.wrong_calls import SEQ, right_call, told, works

# ---- cases: what the ranks run -------------------------------------------------------------------------


def disagree(rank: int, name: str) -> tuple[str, bool]:
    arguments, (ours, theirs, _) = right_call(rank, batch=1), DISAGREEMENTS[name]
    return told(arguments | (theirs if rank else ours)(arguments)), works(rank)


def permuted_keys(rank: int) -> tuple[str, bool]:
    """Keys of equal shards, which rank 1 takes to lie the other way round."""
    arguments, sharding = right_call(rank), TokenSharding(batch=2, seq=Partition((3, 3)))
    arguments |= {name: arguments[name][:, :3] for name in ("k_BlGH", "v_BlGH")}
    return told(arguments | {"kv_sharding": sharding.select((1, 0)) if rank else sharding}), works(rank)


def sharding_differs(rank: int) -> tuple[str, bool]:
    """Rank 1 cuts the sequence otherwise, and has what its own cut gives it."""
    arguments = right_call(rank)
    if rank == 1:
        cut = {name: arguments[name][:, :3] for name in ("q_BlNH", "k_BlGH", "v_BlGH")}
        arguments |= cut | {"sharding": TokenSharding(batch=2, seq=Partition((4, 3)))}
    return told(arguments), works(rank)


def order_differs(rank: int) -> tuple[str, bool]:
    """Rank 1 has sequence-first tensors, and says so: the same number of values."""
    arguments = right_call(rank)
    if rank == 1:
        arguments |= {name: arguments[name].transpose(0, 1) for name in ("q_BlNH", "k_BlGH", "v_BlGH")}
        arguments["sharding"] = TokenSharding(batch=2, seq=Partition(SEQ), order="LB")
    return told(arguments), works(rank)


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_are_told_apart(rank_pool: RankPool, name: str) -> None:
    (text, usable), *others = rank_pool.run(disagree, 2, name)
    ours, theirs = text.split("; rank [1]: ")
    assert others == [(text, usable)]
    assert usable
    assert ours.startswith("the ranks disagree about one call (rank [0]: torch.")
    assert ", widths (6, 4), query heads (" in ours
    assert theirs.endswith("; every rank of the group has to pass the same values")
    assert DISAGREEMENTS[name][2][0] in ours
    assert DISAGREEMENTS[name][2][1] in theirs


@pytest.mark.parametrize("case", [sharding_differs, order_differs, permuted_keys])
def test_shardings_that_differ_between_ranks(rank_pool: RankPool, case: Callable[[int], tuple[str, bool]]) -> None:
    """Ranks that expect other sizes of each other, or the same in another order."""
    (text, usable), *others = rank_pool.run(case, 2)
    assert others == [(text, usable)]
    assert usable
    assert text.startswith("the ranks disagree about one call (rank [0]: torch.float32, ")
