"""What joined ranks know of each other, as threads over one store."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from moe_dispatch.lab.desk.exits import CouldNotRun
from moe_dispatch.lab.desk.ranks import presence
from moe_dispatch.lab.desk.ranks.presence import MeetingPoint, Presence
from tests.support.lab.launches import free_ports

T = TypeVar("T")
Meet = Callable[[int], list[Presence]]
POINT = MeetingPoint(host="127.0.0.1", port=29500, has_store=False, prefix="p")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PULSE_SECONDS", 0.05), ("SILENT_SECONDS", 1.5), ("LEAVE_SECONDS", 8.0)):
        monkeypatch.setattr(presence, name, value)


def ranks_of(store: HashStore, size: int) -> list[Presence]:
    return [Presence(store, rank=rank, size=size, point=POINT) for rank in range(size)]


def at_once(calls: list[Callable[[], T]]) -> list[T]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


@pytest.fixture
def met() -> Iterator[Callable[[int], list[Presence]]]:
    """Makes ranks that know of each other. Their threads end before Python does, which would not survive them."""
    made: list[Presence] = []

    def meet(size: int) -> list[Presence]:
        ranks = ranks_of(HashStore(), size)
        at_once([lambda rank=rank: rank.meet("x", timeout=30) for rank in ranks])
        for rank in ranks:
            rank.start()
        made.extend(ranks)
        time.sleep(0.2)
        return ranks

    yield meet
    for rank in made:
        rank.stop()


def test_ranks_that_meet_know_what_each_brought() -> None:
    ranks = ranks_of(HashStore(), 3)
    brought = at_once([lambda i=i, rank=rank: rank.meet(f"of {i}", timeout=5) for i, rank in enumerate(ranks)])
    assert brought == [["of 0", "of 1", "of 2"]] * 3


def test_ranks_that_do_not_come_are_named_on_all_that_did() -> None:
    ranks = ranks_of(HashStore(), 4)

    def told(rank: Presence, timeout: float) -> str:
        with pytest.raises(CouldNotRun) as error:
            rank.meet("x", timeout=timeout)
        return str(error.value)

    start = time.monotonic()
    texts = at_once([lambda: told(ranks[0], 0.3), lambda: told(ranks[2], 30)])
    assert time.monotonic() - start < 5
    assert texts[0].startswith("ranks [1, 3] did not come to 127.0.0.1:29500 within 0.3 s; start all 4 ranks")
    assert set(texts) == {texts[0]}


def test_a_rank_that_gives_no_sign_any_more_is_missed_on_every_other(met: Meet) -> None:
    ranks = met(3)
    assert [rank.diagnosis() for rank in ranks] == ["", "", ""]
    ranks[1].place = "row 7"
    time.sleep(0.2)
    ranks[1].stop()
    told = [ranks[i].diagnosis() for i in (0, 2)]
    assert told == ["rank 1 does not answer: it ended, is stopped, or the link is down (last seen at row 7)"] * 2


def test_of_ranks_that_leave_the_first_is_to_blame_and_knows_it(met: Meet) -> None:
    ranks = met(3)
    ranks[2].leave("it fell over")
    time.sleep(0.2)
    ranks[0].leave("connection closed")
    time.sleep(0.2)
    assert ranks[1].someone_left()
    assert [rank.diagnosis() for rank in ranks] == ["rank 2 ended: it fell over"] * 2 + [""]


def test_a_rank_that_is_missed_is_to_blame_before_those_that_left_for_it(met: Meet) -> None:
    ranks = met(3)
    ranks[1].stop()
    ranks[0].leave("connection closed")
    assert ranks[2].diagnosis().startswith("rank 1 does not answer")


def test_ranks_at_another_place_are_told(met: Meet) -> None:
    ranks = met(2)
    ranks[0].place = "row 2"
    time.sleep(0.2)
    assert ranks[1].elsewhere() == "rank 0 lives, and is at row 2"
    ranks[1].place = "row 2"
    assert ranks[1].elsewhere() == ""


def test_the_rank_with_the_store_stays_until_the_others_have_read_why_it_leaves(met: Meet) -> None:
    ranks = met(2)
    ranks[0].leave("so be it")

    def see_off(rank: Presence) -> float:
        start = time.monotonic()
        rank.see_off()
        return time.monotonic() - start

    def leave_late() -> float:
        time.sleep(0.8)
        assert ranks[1].diagnosis() == "rank 0 ended: so be it"
        ranks[1].leave("after it")
        time.sleep(0.4)
        return see_off(ranks[1])

    first, second = at_once([lambda: see_off(ranks[0]), leave_late])
    assert 1.2 < first < 7.0
    assert second < 5.0


def test_a_store_that_nobody_opened_and_one_that_cannot_be_opened_are_told() -> None:
    (port,) = free_ports(1)
    point = MeetingPoint(host="127.0.0.1", port=int(port), has_store=False, prefix="p")
    with pytest.raises(
        CouldNotRun, match=r"rank 1 found nobody at .* within 0.3 s, .* \(.*refused\); start rank 0, or"
    ):
        point.open(rank=1, size=2, timeout=0.3)
    elsewhere = MeetingPoint(host="127.0.0.1", port=int(port), has_store=True, prefix="p")
    with pytest.raises(CouldNotRun, match="rank 0 found nobody"):
        elsewhere.open(rank=0, size=2, timeout=0.3)
    kept = point.open(rank=0, size=2, timeout=5)
    with pytest.raises(CouldNotRun, match=rf"rank 0 cannot listen at 127.0.0.1:{port} .*choose another MASTER_PORT"):
        point.open(rank=0, size=2, timeout=5)
    del kept
