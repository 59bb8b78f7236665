"""What the tests of RankPool and RankThreads run on ranks, and what they ask of processes."""

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from moe_dispatch.testing import RankPool

STUCK_SECONDS = 600.0  # what a case sleeps that is never meant to wake
SOON_SECONDS = 30.0  # measured 1 s on idle cores; 60 s, the time-out of a case, would mean that it was waited for


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
