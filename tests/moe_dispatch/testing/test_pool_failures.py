"""Ranks that are processes and fail: no failure keeps the other ranks, or the next case, waiting."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from moe_dispatch.testing import RankError, RankPool, RankTimeout
from moe_dispatch.testing.processes import team
from tests.support.dispatch.rank_cases import (
    SOON_SECONDS,
    assert_fresh_and_healthy,
    crash_on_rank_1,
    exit_on_rank_1,
    leave,
    place,
    raise_and_then_exit,
    raise_in_turn,
    raise_on_rank_1,
    remaining,
    return_lambda,
    stand_in_three_places,
    wait_in_all_reduce,
    wait_in_barrier,
    wait_in_sleep,
)  # fmt: skip


@pytest.fixture(scope="module")
def rank_pool() -> Iterator[RankPool]:
    """Not the one of the session: a rank that is killed writes no coverage of the cases before."""
    with RankPool() as pool:
        yield pool


@pytest.mark.parametrize("wait", [pytest.param(wait_in_barrier, marks=pytest.mark.sweep), wait_in_all_reduce])
def test_an_exception_on_one_rank_ends_the_ranks_that_wait_for_it(
    rank_pool: RankPool, wait: Callable[[], None]
) -> None:
    pids = rank_pool.run(os.getpid, 2)
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        rank_pool.run(raise_on_rank_1, 2, wait)
    assert time.monotonic() - started < SOON_SECONDS
    fact, traceback = str(caught.value).split("\n\n", 1)
    assert fact == "raise_on_rank_1 failed on 1 of 2 ranks; ranks [0] had not finished, and were killed"
    assert traceback.startswith("rank 1 raised\nTraceback (most recent call last):\n")
    assert "in raise_on_rank_1\n" in traceback
    assert traceback.endswith("\nLookupError: the fact of rank 1")
    assert_fresh_and_healthy(rank_pool, pids)


def test_ranks_that_all_raise_are_all_reported_the_first_one_first_and_replaced(
    rank_pool: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(team, "GRACE_SECONDS", SOON_SECONDS)  # both fail, however busy the machine is
    pids = rank_pool.run(os.getpid, 2)
    with pytest.raises(RankError) as caught:
        rank_pool.run(raise_in_turn, 2)
    fact, *texts = str(caught.value).split("\n\n")
    assert fact == "raise_in_turn failed on 2 of 2 ranks"
    assert [text.splitlines()[0] for text in texts] == ["rank 1 raised", "rank 0 raised"]
    assert [text.splitlines()[-1][-6:] for text in texts] == ["rank 1", "rank 0"]
    assert_fresh_and_healthy(rank_pool, pids)


DEATHS = [
    (exit_on_rank_1, "7", ""),
    pytest.param(raise_and_then_exit, "7", "", marks=pytest.mark.sweep),
    (crash_on_rank_1, "-11 (SIGSEGV)", "in crash_on_rank_1"),
]


@pytest.mark.parametrize(("case", "exit_code", "place"), DEATHS)
def test_a_rank_that_dies_ends_the_case_and_is_named_first(
    rank_pool: RankPool, monkeypatch: pytest.MonkeyPatch, case: Callable[[int], None], exit_code: str, place: str
) -> None:
    monkeypatch.setattr(team, "GRACE_SECONDS", SOON_SECONDS)  # both fail, however busy the machine is
    pids = rank_pool.run(os.getpid, 2)
    with pytest.raises(RankError) as caught:
        rank_pool.run(case, 2)
    death = str(caught.value).partition("\n\n")[2].partition("\n\nrank 0")[0]
    assert death.splitlines()[0] == f"rank 1 died with exit code {exit_code}"
    assert place in death
    assert_fresh_and_healthy(rank_pool, pids)


def test_a_rank_that_died_between_two_cases_is_reported(rank_pool: RankPool) -> None:
    pids = rank_pool.run(os.getpid, 2)
    os.kill(pids[1], signal.SIGKILL)
    assert remaining(pids[1:]) == []
    with pytest.raises(RankError, match=r"rank 1 died with exit code -9 \(SIGKILL\)"):
        rank_pool.run(os.getpid, 2)
    assert_fresh_and_healthy(rank_pool, pids)


def test_a_time_out_tells_where_each_rank_stood(rank_pool: RankPool) -> None:
    rank_pool.run(place, 3)  # has the ranks import this module: the seconds below are for the case
    pids = rank_pool.run(os.getpid, 3)
    with pytest.raises(RankTimeout) as caught:
        rank_pool.run(stand_in_three_places, 3, timeout=3)
    assert isinstance(caught.value, RankError)
    fact, *places = str(caught.value).split("\n\n")
    assert fact.startswith(
        "stand_in_three_places did not finish within 3 s on ranks [0, 1] of 3; if it is only slow, "
    )
    assert [place.splitlines()[0] for place in places[:2]] == ["rank 0 stood at", "rank 1 stood at"]
    assert "in wait_in_all_reduce\n" in places[0]
    assert "in wait_in_sleep\n" in places[1]
    assert places[2] == "rank 2 finished"
    assert all(place.endswith("in stand_in_three_places") for place in places[:2])  # our own frames are left out
    assert_fresh_and_healthy(rank_pool, pids)


@pytest.mark.parametrize(
    ("case", "fact"), [(return_lambda, "Can't pickle .*<lambda>"), (leave, "SystemExit: left early")]
)
def test_what_a_rank_cannot_answer_is_its_error(rank_pool: RankPool, case: Callable[[], object], fact: str) -> None:
    with pytest.raises(RankError, match=rf"(?s)\n\nrank 0 raised\n.*{fact}"):
        rank_pool.run(case, 1)


def test_an_interrupt_in_the_parent_ends_the_ranks(rank_pool: RankPool) -> None:
    pids = rank_pool.run(os.getpid, 2)
    interrupt = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        interrupt.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            rank_pool.run(wait_in_sleep, 2)
        assert time.monotonic() - started < SOON_SECONDS
    finally:
        signal.signal(signal.SIGINT, before)
    assert_fresh_and_healthy(rank_pool, pids)


def test_ranks_that_cannot_find_each_other_say_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    with (
        RankPool() as pool,
        pytest.raises(
            RankError,
            match=r"(?s)^the start of 1 ranks failed.*GLOO_SOCKET_IFNAME is 'no-such-interface', but this "
            r"machine has no network interface no-such-interface, only .*lo.*; set it to",
        ),
    ):
        pool.run(place, 1)
    assert "Traceback" not in capfd.readouterr().err  # it ends in order, although there is no group to leave


def test_the_start_may_take_as_long_as_the_call_or_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "START_SECONDS", 0.01)
    told = r"^the start of 1 ranks did not finish within 0.02 s .*; if it is only slow, pass a longer timeout="
    with RankPool() as pool, pytest.raises(RankTimeout, match=told):
        pool.run(place, 1, timeout=0.02)
    with RankPool() as pool:
        assert pool.run(place, 1, timeout=60) == pool.run(place, 1)


def test_a_time_out_names_a_rank_that_does_not_answer_in_its_first_line(rank_pool: RankPool) -> None:
    rank_pool.run(place, 2)
    pids = rank_pool.run(os.getpid, 2)
    os.kill(pids[1], signal.SIGSTOP)
    with pytest.raises(RankTimeout) as caught:
        rank_pool.run(wait_in_all_reduce, 2, timeout=1)
    assert str(caught.value).splitlines()[0] == (
        "wait_in_all_reduce did not finish within 1 s on ranks [0, 1] of 2, and rank 1 did not answer: stopped, or "
        "stuck outside of Python; if it is only slow, pass a longer timeout="
    )
    assert_fresh_and_healthy(rank_pool, pids)
