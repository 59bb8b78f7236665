"""What runs on processes and on threads have in common: who runs what, the first random numbers, what is refused."""

import time
from typing import Any

import pytest
import torch

from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.rank_cases import arguments_after_rank, arguments_before_rank, draw, place, sum_over_ranks

Ranks = RankPool | RankThreads


@pytest.fixture(params=["rank_pool", "rank_threads"])
def any_ranks(request: pytest.FixtureRequest) -> Ranks:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_results_come_in_rank_order_from_a_group_of_that_size(any_ranks: Ranks, ranks: int) -> None:
    assert any_ranks.run(place, ranks) == [(rank, rank, ranks) for rank in range(ranks)]


def test_rank_is_passed_to_a_first_parameter_of_that_name_only(any_ranks: Ranks) -> None:
    assert any_ranks.run(arguments_after_rank, 2, "a", 3) == [(0, ("a", 3)), (1, ("a", 3))]
    assert any_ranks.run(arguments_before_rank, 2, "a", "b") == [("a", "b"), ("a", "b")]
    assert any_ranks.run(time.sleep, 2, 0.0) == [None, None]  # a builtin that has no signature to look at


def test_tensors_reach_the_ranks_and_come_back(any_ranks: Ranks) -> None:
    x_D = torch.arange(6, dtype=torch.float64)[1::2]
    for sum_D in any_ranks.run(sum_over_ranks, 3, x_D):
        assert (sum_D.dtype, sum_D.tolist()) == (torch.float64, [111.0, 333.0, 555.0])


def test_every_case_starts_from_seed_0_on_every_rank(any_ranks: Ranks) -> None:
    expected = torch.rand(3, generator=torch.Generator().manual_seed(0)).tolist()
    assert any_ranks.run(draw, 2) == any_ranks.run(draw, 2) == [expected, expected]


@pytest.mark.parametrize("ranks", [0, -1, 2.0, True, "2", None])
def test_a_number_of_ranks_that_is_not_an_int_above_0_is_refused(any_ranks: Ranks, ranks: Any) -> None:
    with pytest.raises(ValueError, match=rf"^ranks is {ranks!r}; it has to be an int of at least 1"):
        any_ranks.run(place, ranks)


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan"), True, None])
def test_a_time_out_that_is_not_a_number_above_0_is_refused(any_ranks: Ranks, timeout: Any) -> None:
    with pytest.raises(ValueError, match=rf"^timeout is {timeout!r}; it has to be a number of seconds above 0"):
        any_ranks.run(place, 2, timeout=timeout)
