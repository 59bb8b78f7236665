"""What joined ranks tell each other beside their collectives: who came, who lives and where, who left and why.

All of it goes through the store at MASTER_ADDR, on a connection of its own: a rank that waits in a collective says
so, and one that was stopped or cut off is missed. Calls of the store may hang with their link, so only threads make
them that nobody has to wait for.
"""

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from threading import Event, Thread

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ..exits import MAY_BE_LEFT, CouldNotRun

PULSE_SECONDS = 0.5
SILENT_SECONDS = 3.0  # without a sign: six pulses
LEAVE_SECONDS = 8.0  # that the rank with the store waits for the others, who look for up to 3.5 s for who is missing


@dataclass(frozen=True, slots=True, kw_only=True)
class MeetingPoint:
    """Where the store is.

    Attributes:
        has_store: whether the launcher has one there; else rank 0 opens it.
        prefix: of the keys, so that a restart of the ranks begins anew.
    """

    host: str
    port: int
    has_store: bool
    prefix: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def open(self, *, rank: int, size: int, timeout: float) -> tuple[Store, Store]:
        """The store, twice: each has a connection of its own.

        Raises:
            CouldNotRun: nobody listens there within ``timeout`` seconds, or rank 0 cannot.
        """
        opens, limit = rank == 0 and not self.has_store, timedelta(seconds=timeout)
        try:
            if not opens:
                self._find_listener(timeout)
            first, second = (
                TCPStore(self.host, self.port, size, opening, limit, wait_for_workers=False)
                for opening in (opens, False)
            )
            return PrefixStore(self.prefix, first), PrefixStore(self.prefix, second)
        except (OSError, RuntimeError, ValueError) as error:
            if opens:
                fact, remedy = f"rank 0 cannot listen at {self}", "choose another MASTER_PORT, on this host"
            else:
                fact = f"rank {rank} found nobody at {self} within {timeout:g} s, where rank 0 listens"
                remedy = "start rank 0, or correct MASTER_ADDR and MASTER_PORT"
            raise CouldNotRun(f"{fact} ({str(error).splitlines()[0]}); {remedy}") from None

    def _find_listener(self, timeout: float) -> None:
        """Return once somebody listens. A TCPStore takes three time-outs to find nobody, and prints stacks."""
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            try:
                socket.create_connection((self.host, self.port), max(left, 0.1)).close()
                return
            except OSError:
                if left < 0:
                    raise
                time.sleep(min(0.2, max(left, 0.0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """The last that a rank said.

    Attributes:
        count: how often it said something.
        place: what it is at.
        end: why it leaves; empty while it does not.
        order: 1 for the first rank to leave, 2 for the next.
        gone: whether it has heard why the others leave, so that nobody has to stay for it.
    """

    count: int = 0
    place: str = ""
    end: str = ""
    order: int = 0
    gone: bool = False


class Presence:
    """This rank among the others. ``start`` the pulse once all have met."""

    def __init__(self, store: Store, *, rank: int, size: int, point: MeetingPoint) -> None:
        self.place = "the start"
        self._store, self._rank, self._size, self._point = store, rank, size, point
        self._end, self._order, self._count = "", 0, 0
        self._going, self._gone = False, False
        self._wake, self._over = Event(), False
        self._signs = [Sign()] * size
        self._heard = [time.monotonic()] * size  # when a rank last said something new
        self._answered = time.monotonic()  # when the store last did
        self._thread = Thread(target=self._pulse, name=MAY_BE_LEFT, daemon=True)

    def meet(self, brought: str, *, timeout: float) -> list[str]:
        """What every rank brought, in rank order.

        Raises:
            CouldNotRun: ranks that did not come within ``timeout`` seconds; the same on all that did.
        """
        self._store.set(f"brought/{self._rank}", brought)
        self._say()
        missing, deadline = set(range(self._size)), time.monotonic() + timeout
        while missing := {rank for rank in missing if not self._store.check([f"brought/{rank}"])}:
            if time.monotonic() > deadline and not self._store.check(["given up"]):
                self._store.set(
                    "given up",
                    f"{_ranks(missing)} did not come to {self._point} within {timeout:g} s; start all {self._size} "
                    "ranks, with the same MASTER_ADDR and MASTER_PORT, or raise --timeout",
                )
            if self._store.check(["given up"]):
                time.sleep(PULSE_SECONDS)  # who opened the store takes it along
                raise CouldNotRun(self._store.get("given up").decode())
            time.sleep(0.1)
        return [text.decode() for text in self._store.multi_get([f"brought/{rank}" for rank in range(self._size)])]

    def start(self) -> None:
        """Let the others know from now on that this rank lives, and know it of them."""
        self._heard = [time.monotonic()] * self._size
        self._thread.start()

    def stop(self) -> None:
        """The ranks end in order: nobody will be missed."""
        self._over = True
        self._wake.set()
        self._thread.join(PULSE_SECONDS)

    def leave(self, reason: str) -> None:
        """Tell the others that this rank ends, and why; the first reason counts."""
        self._end = self._end or reason
        self._wake.set()

    def see_off(self) -> None:
        """Return once the others know: at once, but for the rank that takes the store along, and goes last."""
        self._going = True
        self._wake.set()
        deadline = time.monotonic() + LEAVE_SECONDS
        takes_store = self._rank == 0 and not self._point.has_store
        while time.monotonic() < deadline:
            if (self._gone or self._store_is_silent()) and not (takes_store and self._staying()):
                break
            time.sleep(PULSE_SECONDS / 5)
        self.stop()

    def someone_left(self) -> bool:
        return any(sign.end for rank, sign in enumerate(self._signs) if rank != self._rank)

    def diagnosis(self) -> str:
        """Which other rank is to blame that this one cannot go on; empty where none is. Takes up to 3.5 s."""
        asked = time.monotonic()
        while not (told := self._missing()) and time.monotonic() < asked + SILENT_SECONDS + PULSE_SECONDS:
            if all(self._heard[rank] > asked + PULSE_SECONDS for rank in self._living()):
                break
            time.sleep(0.1)
        if told:
            return told
        left = [(sign.order, rank) for rank, sign in enumerate(self._signs) if sign.end]
        first = min(left, default=(0, self._rank))[1]
        return "" if first == self._rank else f"rank {first} ended: {self._signs[first].end}"

    def elsewhere(self) -> str:
        """Which living ranks are not where this one is; empty where none is."""
        ranks = [rank for rank in self._living() if self._signs[rank].place != self.place]
        return "; ".join(f"rank {rank} lives, and is at {self._signs[rank].place}" for rank in ranks)

    def _store_is_silent(self) -> bool:
        return time.monotonic() - self._answered > SILENT_SECONDS

    def _missing(self) -> str:
        now = time.monotonic()
        if self._store_is_silent():
            return f"the store at {self._point} does not answer: rank 0 ended, is stopped, or the link to it is down"
        silent = [rank for rank in self._living() if now - self._heard[rank] > SILENT_SECONDS]
        if not silent:
            return ""
        seen = f"last seen at {self._signs[silent[0]].place}"
        be, end = ("does", "it ended, is") if len(silent) == 1 else ("do", "they ended, are")
        return f"{_ranks(silent)} {be} not answer: {end} stopped, or the link is down ({seen})"

    def _living(self) -> list[int]:
        """The other ranks, but for those that said that they leave."""
        return [rank for rank, sign in enumerate(self._signs) if rank != self._rank and not sign.end]

    def _staying(self) -> bool:
        """Whether some other rank still listens."""
        now = time.monotonic()
        return any(
            not sign.gone and now - self._heard[rank] < SILENT_SECONDS
            for rank, sign in enumerate(self._signs)
            if rank != self._rank
        )

    def _pulse(self) -> None:
        keys = [f"sign/{rank}" for rank in range(self._size)]
        try:
            while not self._over:
                self._say()
                for rank, text in enumerate(self._store.multi_get(keys)):
                    sign = Sign(**json.loads(text))
                    if sign.count != self._signs[rank].count:
                        self._signs[rank], self._heard[rank] = sign, time.monotonic()
                self._answered = time.monotonic()
                self._wake.wait(PULSE_SECONDS)
                self._wake.clear()
        except RuntimeError:  # the store has gone: it answers no more
            return

    def _say(self) -> None:
        if self._end and not self._order:
            self._order = self._store.add("left", 1)
        self._count += 1
        end, going = self._end if self._order else "", self._going
        sign = Sign(count=self._count, place=self.place, end=end, order=self._order, gone=going)
        self._store.set(f"sign/{self._rank}", json.dumps(asdict(sign)))
        self._gone = going


def _ranks(ranks: Sequence[int] | set[int]) -> str:
    ranks = sorted(ranks)
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks}"
