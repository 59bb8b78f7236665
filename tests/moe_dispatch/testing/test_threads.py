"""Ranks that are threads: what each has of its own, how they fail, and that the process is as it was before."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from moe_dispatch.testing import RankError, RankThreads, RankTimeout, threads
from moe_dispatch.testing.turns import Turns
from tests.support.dispatch.rank_cases import (
    SOON_SECONDS,
    STUCK_SECONDS,
    leave,
    place,
    raise_on_rank_1,
    sum_over_ranks,
    wait_in_all_reduce,
    wait_in_barrier,
)  # fmt: skip


def stop_here(rank: int) -> None:
    if rank == 1:
        while True:  # no line of it waits
            pass
    wait_in_barrier()


def sleep_here(rank: int, seconds: float) -> None:
    if rank == 1:
        time.sleep(seconds)
    wait_in_barrier()


def raise_on_all(rank: int) -> None:
    wait_in_barrier()
    raise LookupError(f"the fact of rank {rank}")


def assert_healthy(rank_threads: RankThreads) -> None:
    """No rank is left, and the next run works."""
    for thread in threading.enumerate():
        if thread.name.startswith("rank "):
            thread.join(SOON_SECONDS)  # at once, but on a busy machine
            assert not thread.is_alive()
    assert rank_threads.run(place, 3) == [(rank, rank, 3) for rank in range(3)]


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """Every run here, also one that fails, leaves these alone."""
    torch.manual_seed(7)
    torch.set_num_threads(2)  # not what a run sets
    before = (dist.distributed_c10d._world, torch.get_num_threads(), torch.get_rng_state().tolist(), warnings.filters)
    yield
    after = (dist.distributed_c10d._world, torch.get_num_threads(), torch.get_rng_state().tolist(), warnings.filters)
    torch.set_num_threads(1)
    assert after == before
    assert not dist.is_initialized()


# ---- what a rank has of its own ------------------------------------------------------------------


def test_any_function_will_do_and_arguments_need_not_be_pickled(rank_threads: RankThreads) -> None:
    double: Callable[[int], int] = lambda x: 2 * x  # noqa: E731
    assert rank_threads.run(lambda rank, f: f(rank), 3, double) == [0, 2, 4]


def test_every_rank_gets_its_own_copy_of_the_arguments(rank_threads: RankThreads) -> None:
    x_D, shared = torch.zeros(2), [torch.ones(1)]

    def write(rank: int, y_D: torch.Tensor, first: list[torch.Tensor], again: list[torch.Tensor]) -> list[float]:
        assert first is again  # what is one object stays one object
        y_D += rank
        first[0] += rank
        dist.barrier()
        return y_D.tolist() + first[0].tolist()

    assert rank_threads.run(write, 3, x_D, shared, shared) == [[r, r, r + 1.0] for r in (0.0, 1.0, 2.0)]
    assert (x_D.tolist(), shared[0].tolist()) == ([0.0, 0.0], [1.0])


def test_an_argument_that_cannot_be_copied_is_refused(rank_threads: RankThreads) -> None:
    rule = "cannot be copied for a rank .* make process groups and the like inside the function"
    with pytest.raises(ValueError, match=rf"wait_in_barrier.* {rule}"):
        rank_threads.run(wait_in_barrier, 2, threading.Lock())
    with pytest.raises(ValueError, match=rule):
        rank_threads.run(wait_in_barrier, 2, torch.ones(1, requires_grad=True) * 2)  # a tensor with a history


def test_every_rank_draws_its_own_random_numbers_however_the_turns_go(rank_threads: RankThreads) -> None:
    def draw_between_collectives(rank: int) -> list[float]:
        drawn = []
        for _ in range(3):
            drawn += torch.rand(2).tolist()
            dist.barrier()
        return drawn

    expected = torch.rand(6, generator=torch.Generator().manual_seed(0)).tolist()
    assert rank_threads.run(draw_between_collectives, 3) == [expected] * 3


def test_grad_mode_and_autocast_are_a_ranks_own(rank_threads: RankThreads) -> None:
    def modes(rank: int) -> tuple[bool, bool, int]:
        with torch.set_grad_enabled(rank == 0), torch.autocast("cpu", enabled=rank == 1):
            dist.barrier()
            return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads()

    assert rank_threads.run(modes, 3) == [(True, False, 1), (False, True, 1), (False, False, 1)]


def test_a_rank_that_is_slow_to_leave_is_left_in_peace(
    rank_threads: RankThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that ends by an exception is a warning, and here an error."""
    leave = Turns.leave

    def leave_slowly(turns: Turns, rank: int) -> None:
        deadline = time.monotonic() + 0.02
        while time.monotonic() < deadline:
            pass
        leave(turns, rank)

    monkeypatch.setattr(Turns, "leave", leave_slowly)
    assert rank_threads.run(place, 3) == [(rank, rank, 3) for rank in range(3)]


def test_filters_of_warnings_that_ranks_change_in_turns_are_put_back(rank_threads: RankThreads) -> None:
    def ignore(rank: int) -> None:
        with warnings.catch_warnings():  # the ranks leave it in another order than they entered it
            warnings.simplefilter("ignore")
            dist.barrier()

    rank_threads.run(ignore, 3)  # the fixture above compares


def test_ranks_run_in_order_and_change_where_they_wait(rank_threads: RankThreads) -> None:
    for _ in range(3):
        seen: list[tuple[int, str]] = []

        def note(rank: int, seen: list[tuple[int, str]] = seen) -> None:
            seen.append((rank, "before"))
            dist.barrier()
            seen.append((rank, "after"))

        rank_threads.run(note, 3)
        # The last to come goes on, because nothing keeps it.
        order = [(0, "before"), (1, "before"), (2, "before"), (2, "after"), (0, "after"), (1, "after")]
        assert seen == order


def test_64_ranks_take_no_longer_than_a_spawned_process(rank_threads: RankThreads) -> None:
    started = time.monotonic()
    for sum_D in rank_threads.run(lambda rank: sum_over_ranks(rank % 2, torch.ones(2)), 64):
        assert sum_D.tolist() == [352.0, 352.0]
    assert time.monotonic() - started < SOON_SECONDS  # measured 0.03 s


# ---- ranks that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [wait_in_barrier, wait_in_all_reduce])
def test_an_exception_on_one_rank_ends_the_ranks_that_wait_for_it(
    rank_threads: RankThreads, wait: Callable[[], None]
) -> None:
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        rank_threads.run(raise_on_rank_1, 3, wait)
    assert not isinstance(caught.value, RankTimeout)
    assert time.monotonic() - started < SOON_SECONDS
    fact, traceback = str(caught.value).split("\n\n", 1)
    assert fact == "raise_on_rank_1 failed on 1 of 3 ranks; ranks [0, 2] had not finished, and were stopped"
    assert traceback.startswith("rank 1 raised\nTraceback (most recent call last):\n")
    assert "in raise_on_rank_1\n" in traceback
    assert traceback.endswith("\nLookupError: the fact of rank 1")
    assert_healthy(rank_threads)


def test_ranks_that_all_raise_are_all_reported_the_first_one_first(rank_threads: RankThreads) -> None:
    with pytest.raises(RankError) as caught:
        rank_threads.run(raise_on_all, 3)
    fact, *texts = str(caught.value).split("\n\n")
    assert fact == "raise_on_all failed on 3 of 3 ranks"
    assert [text.splitlines()[0] for text in texts] == ["rank 2 raised", "rank 0 raised", "rank 1 raised"]
    assert [text.splitlines()[-1][-6:] for text in texts] == ["rank 2", "rank 0", "rank 1"]
    assert_healthy(rank_threads)


def test_a_rank_that_is_stopped_runs_its_finally_blocks_and_nothing_else(rank_threads: RankThreads) -> None:
    seen = []

    def tidy(rank: int) -> None:
        try:
            raise_on_rank_1(rank, wait_in_barrier)
        except Exception:
            seen.append((rank, "except"))
            raise
        finally:
            seen.append((rank, "finally"))
            if rank != 1:
                dist.barrier()  # stopped again, and at once

    with pytest.raises(RankError, match="tidy failed on 1 of 3 ranks"):
        rank_threads.run(tidy, 3)
    assert seen == [(1, "except"), (1, "finally"), (0, "finally"), (2, "finally")]


def test_leaving_by_sys_exit_is_an_error(rank_threads: RankThreads) -> None:
    with pytest.raises(RankError, match=r"(?s)\n\nrank 0 raised\n.*SystemExit: left early"):
        rank_threads.run(leave, 1)


def test_ranks_that_wait_for_one_that_finished_are_reported_at_once(rank_threads: RankThreads) -> None:
    started = time.monotonic()
    with pytest.raises(RankTimeout) as caught:
        rank_threads.run(lambda rank: None if rank == 1 else wait_in_all_reduce(), 3)
    assert time.monotonic() - started < SOON_SECONDS
    fact, *places = str(caught.value).split("\n\n")
    assert fact.endswith(" cannot finish: each of ranks [0, 2] of 3 waits for a rank that does not come")
    assert [place.splitlines()[0] for place in places] == ["rank 0 stood at", "rank 1 finished", "rank 2 stood at"]
    assert all("in wait_in_all_reduce\n" in places[rank] for rank in (0, 2))
    assert "/turns.py" not in str(caught.value)  # our own frames are left out
    assert all(place.endswith("in <lambda>") for place in places[::2])
    assert_healthy(rank_threads)


@pytest.mark.parametrize(("case", "args"), [(stop_here, ()), (sleep_here, (4.0,))])
def test_a_time_out_outside_a_collective_tells_where_each_rank_stood(
    rank_threads: RankThreads, case: Callable[..., None], args: tuple[float, ...]
) -> None:
    with pytest.raises(RankTimeout) as caught:
        rank_threads.run(case, 3, *args, timeout=1.5)
    fact, *places = str(caught.value).split("\n\n")
    name = case.__name__
    assert fact.startswith(f"{name} did not finish within 1.5 s on ranks [0, 1, 2] of 3; if it is only slow, ")
    assert [place.splitlines()[0] for place in places] == [f"rank {rank} stood at" for rank in range(3)]
    assert "in wait_in_barrier\n" in places[0]
    assert all(place.endswith(f"in {name}") for place in places[:2])
    assert places[2].endswith("it had no turn yet")
    left = [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]
    for thread in left:  # at once, but on a busy machine; only the one that sleeps stays, and ends when it wakes
        if thread.name == "rank 1" and case is sleep_here:
            assert rank_threads.run(place, 2) == [(0, 0, 2), (1, 1, 2)]
        thread.join(SOON_SECONDS)
        assert not thread.is_alive(), thread.name
    assert_healthy(rank_threads)


def test_a_failure_does_not_wait_for_a_rank_that_stays_away(
    rank_threads: RankThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "GRACE_SECONDS", 0.2)

    def fail_first(rank: int) -> None:
        if rank == 0:
            raise LookupError("the fact of rank 0")
        stop_here(rank)

    started = time.monotonic()
    with pytest.raises(RankError, match=r"failed on 1 of 3 ranks; ranks \[1, 2\] had not finished, and were stopped"):
        rank_threads.run(fail_first, 3, timeout=STUCK_SECONDS)
    assert time.monotonic() - started < SOON_SECONDS
    assert_healthy(rank_threads)


def test_an_interrupt_ends_the_ranks(rank_threads: RankThreads) -> None:
    interrupt = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            rank_threads.run(stop_here, 3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert_healthy(rank_threads)


def test_a_run_inside_a_run_is_refused(rank_threads: RankThreads) -> None:
    with pytest.raises(RankError, match="ValueError: a run of RankThreads within a run of RankThreads"):
        rank_threads.run(lambda: rank_threads.run(place, 2), 1)


def test_what_is_closed_runs_nothing() -> None:
    with RankThreads() as closed:
        assert closed.run(place, 1) == [(0, 0, 1)]
    with pytest.raises(ValueError, match=r"^this RankThreads is closed; .* make a new one$"):
        closed.run(place, 1)
