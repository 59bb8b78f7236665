"""Ranks without torchrun: who runs what, and that nothing a rank does keeps the others, or the next case, waiting."""

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_dispatch.testing import RankError, RankPool, RankTimeout
from moe_dispatch.testing import pool as testing

STUCK_SECONDS = 600.0  # what a case sleeps that is never meant to wake
SOON_SECONDS = 30.0  # measured 1 s on idle cores; 60 s, the time-out of a case, would mean that it was waited for


# ---- cases: what the ranks run -------------------------------------------------------------------


def place(rank: int) -> tuple[int, int, int]:
    return rank, dist.get_rank(), dist.get_world_size()


def arguments_after_rank(rank: int, *args: object) -> tuple[object, ...]:
    return rank, args


def arguments_before_rank(first: object, rank: object) -> tuple[object, ...]:
    return first, rank


def sum_over_ranks(rank: int, x_D: torch.Tensor) -> torch.Tensor:
    sum_D = x_D * 10**rank
    dist.all_reduce(sum_D)
    return sum_D


def draw() -> list[float]:
    return torch.rand(3).tolist()


def settings() -> tuple[int, str]:
    return torch.get_num_threads(), os.environ["GLOO_SOCKET_IFNAME"]


def wait_in_barrier() -> None:
    dist.barrier()


def wait_in_all_reduce() -> None:
    dist.all_reduce(torch.ones(2))


def wait_in_sleep() -> None:
    time.sleep(STUCK_SECONDS)


def raise_on_rank_1(rank: int, wait: Callable[[], None]) -> None:
    if rank == 1:
        raise LookupError("the fact of rank 1")
    wait()


def raise_in_turn(rank: int) -> None:
    dist.barrier()
    time.sleep(0.0 if rank == 1 else 0.5)
    raise LookupError(f"the fact of rank {rank}")


def exit_on_rank_1(rank: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def crash_on_rank_1(rank: int) -> None:
    if rank == 1:
        signal.raise_signal(signal.SIGSEGV)
    dist.barrier()


def stand_in_three_places(rank: int) -> None:
    if rank != 2:
        (wait_in_all_reduce, wait_in_sleep)[rank]()


def return_lambda() -> Callable[[], None]:
    return lambda: None


def leave() -> None:
    sys.exit("left early")


def raise_and_then_exit(rank: int) -> None:
    if rank == 0:
        raise LookupError("what a peer of a dead rank may raise before the death is seen")
    time.sleep(0.5)
    os._exit(7)


def write_at_exit(rank: int, folder: Path, fail: bool) -> None:
    atexit.register((folder / f"rank_{rank}").touch)
    if fail:
        raise_on_rank_1(rank, wait_in_barrier)


def sleep_at_exit() -> int:
    atexit.register(wait_in_sleep)
    return os.getpid()


# ---- what the tests ask --------------------------------------------------------------------------


def remaining(pids: Iterable[int], seconds: float = SOON_SECONDS) -> list[int]:
    """The processes that still run after at most so many seconds. A zombie does not run."""

    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False

    deadline = time.monotonic() + seconds
    while (alive := [pid for pid in pids if runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive


def assert_fresh_and_healthy(pool: RankPool, pids: list[int]) -> None:
    """The ranks ``pids`` are gone, reaped too, and other ranks of that size work together."""
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not set(pids) & set(pool.run(os.getpid, len(pids)))
    expected_D = torch.ones(2) * sum(10**rank for rank in range(len(pids)))
    assert all(sum_D.equal(expected_D) for sum_D in pool.run(sum_over_ranks, len(pids), torch.ones(2)))


def run_script(folder: Path, text: str, *, folder_of_temporaries: Path) -> "subprocess.Popen[str]":
    """A Python program of its own, with warnings as errors."""
    script = folder / "script.py"
    script.write_text(text)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folder_of_temporaries)}
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(script)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# ---- ranks that work -----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_results_come_in_rank_order_from_a_group_of_that_size(rank_pool: RankPool, ranks: int) -> None:
    assert rank_pool.run(place, ranks) == [(rank, rank, ranks) for rank in range(ranks)]


def test_rank_is_passed_to_a_first_parameter_of_that_name_only(rank_pool: RankPool) -> None:
    assert rank_pool.run(arguments_after_rank, 2, "a", 3) == [(0, ("a", 3)), (1, ("a", 3))]
    assert rank_pool.run(arguments_before_rank, 2, "a", "b") == [("a", "b"), ("a", "b")]
    assert rank_pool.run(time.sleep, 2, 0.0) == [None, None]  # a builtin that has no signature to look at


def test_tensors_reach_the_ranks_and_come_back(rank_pool: RankPool) -> None:
    x_D = torch.arange(6, dtype=torch.float64)[1::2]
    for sum_D in rank_pool.run(sum_over_ranks, 3, x_D):
        assert (sum_D.dtype, sum_D.tolist()) == (torch.float64, [111.0, 333.0, 555.0])


def test_every_case_starts_from_seed_0_on_every_rank(rank_pool: RankPool) -> None:
    expected = torch.rand(3, generator=torch.Generator().manual_seed(0)).tolist()
    assert rank_pool.run(draw, 2) == rank_pool.run(draw, 2) == [expected, expected]


def test_a_rank_has_one_thread_and_talks_over_loopback(rank_pool: RankPool) -> None:
    assert rank_pool.run(settings, 2) == [(1, os.environ.get("GLOO_SOCKET_IFNAME", "lo"))] * 2


def test_sizes_live_side_by_side_and_serve_again(rank_pool: RankPool) -> None:
    pids_of_size = {ranks: rank_pool.run(os.getpid, ranks) for ranks in (1, 2, 3)}
    assert len({os.getpid()}.union(*pids_of_size.values())) == 1 + 1 + 2 + 3
    assert {ranks: rank_pool.run(os.getpid, ranks) for ranks in (3, 1, 2)} == pids_of_size


def test_a_module_found_on_a_later_path_is_found_in_the_ranks(
    rank_pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = rank_pool.run(os.getpid, 2)
    (tmp_path / "found_later.py").write_text("import os\n\ndef pid() -> int:\n    return os.getpid()\n")
    monkeypatch.syspath_prepend(tmp_path)
    from found_later import pid  # type: ignore[import-not-found]

    assert rank_pool.run(pid, 2) == pids


def test_an_interrupt_from_the_terminal_leaves_the_ranks_to_the_parent(rank_pool: RankPool) -> None:
    pids = rank_pool.run(os.getpid, 2)
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    assert rank_pool.run(os.getpid, 2) == pids


# ---- ranks that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [wait_in_barrier, wait_in_all_reduce])
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
    monkeypatch.setattr(testing, "GRACE_SECONDS", SOON_SECONDS)  # both fail, however busy the machine is
    pids = rank_pool.run(os.getpid, 2)
    with pytest.raises(RankError) as caught:
        rank_pool.run(raise_in_turn, 2)
    fact, *texts = str(caught.value).split("\n\n")
    assert fact == "raise_in_turn failed on 2 of 2 ranks"
    assert [text.splitlines()[0] for text in texts] == ["rank 1 raised", "rank 0 raised"]
    assert [text.splitlines()[-1][-6:] for text in texts] == ["rank 1", "rank 0"]
    assert_fresh_and_healthy(rank_pool, pids)


DEATHS = [(exit_on_rank_1, 7, ""), (raise_and_then_exit, 7, ""), (crash_on_rank_1, -11, "in crash_on_rank_1")]


@pytest.mark.parametrize(("case", "exit_code", "place"), DEATHS)
def test_a_rank_that_dies_ends_the_case_and_is_named_first(
    rank_pool: RankPool, monkeypatch: pytest.MonkeyPatch, case: Callable[[int], None], exit_code: int, place: str
) -> None:
    monkeypatch.setattr(testing, "GRACE_SECONDS", SOON_SECONDS)  # both fail, however busy the machine is
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
    with pytest.raises(RankError, match="rank 1 died with exit code -9"):
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
    with RankPool() as pool, pytest.raises(RankError, match=r"(?s)^the start of 1 ranks failed.*no-such-interface"):
        pool.run(place, 1)
    assert "Traceback" not in capfd.readouterr().err  # it ends in order, although there is no group to leave


def test_the_start_has_a_time_out_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "START_SECONDS", 0.01)
    with RankPool() as pool, pytest.raises(RankTimeout, match=r"^the start of 1 ranks did not finish within 0.01 s"):
        pool.run(place, 1)


# ---- what is refused before anything is sent -----------------------------------------------------


def local_function() -> Callable[[], None]:
    def local() -> None: ...

    return local


@pytest.mark.parametrize("case", [lambda: None, local_function()])
def test_a_function_that_a_rank_cannot_import_is_refused(rank_pool: RankPool, case: Callable[[], None]) -> None:
    pids = rank_pool.run(os.getpid, 2)
    rule = r"a rank imports the function by name .* define it with `def` at the top of a module"
    with pytest.raises(ValueError, match=rf"<locals>.* cannot be sent to a rank .*{rule}|<lambda>.*{rule}"):
        rank_pool.run(case, 2)
    with pytest.raises(ValueError, match=rf"arguments_after_rank.*<lambda>.*{rule}, and pass plain values"):
        rank_pool.run(arguments_after_rank, 2, lambda: None)
    assert rank_pool.run(os.getpid, 2) == pids


@pytest.mark.parametrize("ranks", [0, -1, 2.0, True, "2", None])
def test_a_number_of_ranks_that_is_not_an_int_above_0_is_refused(rank_pool: RankPool, ranks: Any) -> None:
    with pytest.raises(ValueError, match=rf"^ranks is {ranks!r}; it has to be an int of at least 1"):
        rank_pool.run(place, ranks)


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan"), True, None])
def test_a_time_out_that_is_not_a_number_above_0_is_refused(rank_pool: RankPool, timeout: Any) -> None:
    with pytest.raises(ValueError, match=rf"^timeout is {timeout!r}; it has to be a number of seconds above 0"):
        rank_pool.run(place, 2, timeout=timeout)


# ---- the end -------------------------------------------------------------------------------------


def test_closing_leaves_no_process_no_descriptor_and_no_file(
    rank_pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_pool.run(place, 1)  # from the first spawn on, Python keeps a helper process of its own
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    descriptors = os.listdir("/proc/self/fd")
    with RankPool() as pool:
        pids = pool.run(os.getpid, 1) + pool.run(os.getpid, 2)
        assert len(list(tmp_path.iterdir())) == 2
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert list(tmp_path.iterdir()) == []
    pool.close()
    with pytest.raises(ValueError, match=r"^this RankPool is closed; .* make a new one$"):
        pool.run(place, 1)


@pytest.mark.parametrize(("fail", "written"), [(False, ["rank_0", "rank_1"]), (True, ["rank_1"])])
def test_a_rank_that_is_not_stuck_returns_so_that_coverage_is_written(
    tmp_path: Path, fail: bool, written: list[str]
) -> None:
    with RankPool() as pool:
        if fail:
            with pytest.raises(RankError, match="the fact of rank 1"):
                pool.run(write_at_exit, 2, tmp_path, True)
        else:
            pool.run(write_at_exit, 2, tmp_path, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == written


def test_a_rank_that_does_not_end_when_asked_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "END_SECONDS", 0.5)
    started = time.monotonic()
    with RankPool() as pool:
        pids = pool.run(sleep_at_exit, 1)
    assert time.monotonic() - started < SOON_SECONDS
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


SCRIPT_THAT_ENDS = """
import os
from moe_dispatch.testing import run_ranks

def pid(rank: int) -> int:
    return os.getpid()

if __name__ == "__main__":
    print(*run_ranks(pid, 2))
    print(*run_ranks(pid, 2, timeout=30))
"""


def test_run_ranks_in_a_script_keeps_its_ranks_until_the_script_ends(tmp_path: Path) -> None:
    temporaries = tmp_path / "temporaries"
    temporaries.mkdir()
    script = run_script(tmp_path, SCRIPT_THAT_ENDS, folder_of_temporaries=temporaries)
    out, err = script.communicate(timeout=120)
    assert (script.returncode, err) == (0, "")
    first, second = (line.split() for line in out.splitlines())
    assert first == second
    assert remaining(map(int, first), seconds=0) == []
    assert list(temporaries.iterdir()) == []


SCRIPT_THAT_FORGETS = """
import os
from moe_dispatch.testing import RankPool

if __name__ == "__main__":
    print(*RankPool().run(os.getpid, 1))
    pool = RankPool()
    print(*pool.run(os.getpid, 1))
"""


def test_a_pool_that_nobody_closes_does_not_keep_its_process_from_ending(tmp_path: Path) -> None:
    script = run_script(tmp_path, SCRIPT_THAT_FORGETS, folder_of_temporaries=tmp_path)
    out, err = script.communicate(timeout=120)
    assert script.returncode == 0
    assert remaining(map(int, out.split())) == []
    assert "ResourceWarning" in err
    assert "EOFError" not in err


SCRIPT_THAT_WAITS = """
import os
from moe_dispatch.testing import RankPool
from tests.test_testing import stand_in_three_places

if __name__ == "__main__":
    pool = RankPool()
    print(*pool.run(os.getpid, 1), *pool.run(os.getpid, 3), flush=True)
    pool.run(stand_in_three_places, 3, timeout=600)
"""


def test_ranks_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = run_script(tmp_path, SCRIPT_THAT_WAITS, folder_of_temporaries=tmp_path)
    assert script.stdout is not None
    pids = [int(pid) for pid in script.stdout.readline().split()]
    assert len(pids) == 4
    time.sleep(1.0)  # for the case to reach its places: idle, in a collective, in a sleep, done
    assert remaining(pids, seconds=0) == pids
    script.kill()
    _, err = script.communicate(timeout=SOON_SECONDS)
    assert remaining(pids) == []
    assert err == ""
