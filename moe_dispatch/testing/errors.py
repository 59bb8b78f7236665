"""How a run on several ranks fails, whether they are processes or threads."""

import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


class RankError(RuntimeError):
    """A rank raised or died. The message has exit codes, then tracebacks, the first to fail first."""


class RankTimeout(RankError):
    """A rank did not finish in time. The message has the place where each rank stood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What a rank answers instead of a result."""

    text: str
    when: float  # time.monotonic(), one clock for all processes


def failure_of(rank: int, error: BaseException) -> Failure:
    text = f"rank {rank} raised\n{''.join(traceback.format_exception(error)).rstrip()}"
    return Failure(text=text, when=time.monotonic())


def rank_error(name: str, size: int, failures: Iterable[Failure], unfinished: str = "") -> RankError:
    """The error of a run of ``size`` ranks; ``unfinished`` says what became of ranks that gave no answer."""
    failures = sorted(failures, key=lambda failure: failure.when)
    fact = f"{name} failed on {len(failures)} of {size} ranks{unfinished and f'; {unfinished}'}"
    return RankError("\n\n".join([fact, *(failure.text for failure in failures)]))


def rank_timeout(fact: str, size: int, stacks: Mapping[int, str]) -> RankTimeout:
    """The error of a run in which the ranks of ``stacks`` did not finish. A stack has the latest call first."""
    places = [f"rank {rank} finished" for rank in range(size)]
    for rank, stack in stacks.items():
        places[rank] = f"rank {rank} stood at\n{stack or '  (no answer)'}"
    return RankTimeout("\n\n".join([fact, *places]))


def out_of_time(name: str, size: int, stacks: Mapping[int, str], timeout: float) -> RankTimeout:
    """As :func:`rank_timeout`. A rank whose stack is empty did not answer where it stands."""
    silent = [str(rank) for rank, stack in stacks.items() if not stack]
    fact = f"{name} did not finish within {timeout:g} s on ranks {sorted(stacks)} of {size}"
    if silent:
        ranks = f"rank{'s' * (len(silent) > 1)} {', '.join(silent)}"
        fact = f"{fact}, and {ranks} did not answer: stopped, or stuck outside of Python"
    return rank_timeout(f"{fact}; if it is only slow, pass a longer timeout=", size, stacks)
