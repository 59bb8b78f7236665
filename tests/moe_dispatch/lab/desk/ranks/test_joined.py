"""Joined ranks: what they have to agree about, and that nothing waits longer than the time-out."""

import re
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from moe_dispatch.lab.desk.exits import CouldNotRun, Interrupted, interruptible
from moe_dispatch.lab.desk.ranks import presence
from moe_dispatch.lab.desk.ranks.joined import JoinedRanks, disagreement
from moe_dispatch.lab.desk.ranks.launch import find_launched
from moe_dispatch.testing.processes.rank_process import missing_interface
from tests.support.lab.launches import TORCHRUN, free_ports


def of_rank(problem: str = "", **facts: str) -> dict[str, object]:
    return {"problem": problem, "facts": facts}


def test_ranks_that_mean_the_same_agree() -> None:
    assert disagreement([of_rank(torch="2", steps="3")] * 3) == ""


def test_what_differs_is_named_with_the_ranks() -> None:
    brought = [of_rank(torch="2", steps="3"), of_rank(torch="2", steps="4"), of_rank(torch="2")]
    assert disagreement(brought) == (
        "the ranks were started differently: steps is 3 on rank [0], 4 on rank [1], missing on rank [2]; "
        "start all of them alike"
    )


def test_of_many_differences_the_first_are_told() -> None:
    one, other = ({str(i): value for i in range(20)} for value in "ab")
    told = disagreement([of_rank(**one), of_rank(**other)])
    assert "4 is a on rank [0], b on rank [1]; and 15 more;" in told


def test_what_one_rank_has_wrong_comes_before_what_differs() -> None:
    brought = [of_rank(steps="3"), of_rank("no such file", steps="4"), of_rank("no such file")]
    assert disagreement(brought) == "ranks [1, 2]: no such file"


def test_an_interface_that_is_not_there_is_named() -> None:
    assert missing_interface({}) == missing_interface({"GLOO_SOCKET_IFNAME": "lo"}) == ""
    assert re.fullmatch(
        r"GLOO_SOCKET_IFNAME is 'lo,eth77', but this machine has no network interface eth77, only .*lo.*; set it to "
        r"the one that leads to the other ranks, or unset it",
        missing_interface({"GLOO_SOCKET_IFNAME": "lo,eth77"}),
    )


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[JoinedRanks]:
    """One rank that a launcher started."""
    monkeypatch.setattr(presence, "PULSE_SECONDS", 0.05)
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": free_ports(1)[0]}
    launched = find_launched(TORCHRUN | environment)
    assert launched
    yield launched.joined(facts={}, timeout=60)
    if dist.is_initialized():  # after a failure
        dist.destroy_process_group()


def test_a_joined_rank_is_in_the_process_group_while_the_context_lasts(alone: JoinedRanks) -> None:
    with alone as ranks:
        assert ranks.is_main
        assert ranks.run(dist.get_world_size) == 1
    assert not dist.is_initialized()


def test_a_call_that_takes_longer_than_the_time_out_is_left_alone(alone: JoinedRanks) -> None:
    finish = threading.Event()

    def wait() -> None:
        alone.timeout = 0.5  # only now: the connection may take longer
        alone.run(finish.wait)

    message = r"^rank 0: the first connection did not end within 0.5 s, which --timeout limits: all ranks live$"
    start = time.monotonic()
    with pytest.raises(CouldNotRun, match=message), alone:
        wait()
    assert time.monotonic() - start < 15
    finish.set()


def fall() -> None:
    raise ZeroDivisionError("over a stone")


def test_an_exception_of_the_call_is_told_with_its_traceback(alone: JoinedRanks) -> None:
    message = r"(?s)^rank 0: the first connection failed: Traceback .* in fall.*ZeroDivisionError: over a stone$"
    with pytest.raises(CouldNotRun, match=message), alone:
        alone.run(fall)


def test_a_signal_ends_a_call_that_waits(alone: JoinedRanks) -> None:
    finish = threading.Event()
    threading.Timer(0.3, signal.raise_signal, (signal.SIGTERM,)).start()
    start = time.monotonic()
    with pytest.raises(Interrupted, match="SIGTERM"), interruptible(), alone:
        alone.run(finish.wait)
    assert time.monotonic() - start < 30  # of a time-out of 60 s
    finish.set()
