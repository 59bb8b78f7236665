"""Where ranks come from: spawned here, or started by torchrun or Slurm and joined."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch

from ....testing import RankPool
from .joined import JoinedRanks
from .presence import MeetingPoint

T = TypeVar("T")

SPAWN = "to have validate spawn its ranks instead, unset {unset}"
MOST_PORT = 65535
MOST_SPAWNED = 64  # 0.3 GB each


class Ranks(Protocol):
    """The ranks of a run, as a context manager."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        ...

    def at(self, place: str) -> None:
        """What this process is at from now on, for errors of its peers."""
        ...

    def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Call ``fn(*args)`` on every rank, in the default process group.

        Returns:
            what rank 0 returned; where joined, what this rank did.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class SpawnedRanks:
    """``size`` gloo ranks on this machine, as child processes; they outlive a call, not the context.

    ``run`` raises ``moe_dispatch.testing.RankError`` where a rank raises, dies, or takes longer than
    ``timeout`` seconds; the next call has fresh ranks.
    """

    is_main = True

    def __init__(self, size: int, *, timeout: float) -> None:
        self.size = size
        self.timeout = timeout
        self._pool = RankPool()

    def at(self, place: str) -> None:
        """The ranks have no peers elsewhere."""

    def run(self, fn: Callable[..., T], *args: Any) -> T:
        return self._pool.run(fn, self.size, *args, timeout=self.timeout)[0]

    def __enter__(self) -> Self:
        self._pool.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.__exit__(*exception)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """This process is one of ``size`` ranks that a launcher started.

    Attributes:
        launcher: the variables that say so, for messages: (that of the size, those to unset).
        point: where the ranks meet.
    """

    rank: int
    size: int
    local_rank: int
    launcher: tuple[str, str]
    point: MeetingPoint

    def check_size(self, size: int) -> None:
        """Raise ValueError unless the launcher started as many ranks as the config wants."""
        if self.size != size:
            of_size, unset = self.launcher
            raise ValueError(
                f"{self.size} ranks were started ({of_size}), but the config has ranks = {size}; "
                f"start {size}, or set ranks = {self.size} in a config; {SPAWN.format(unset=unset)}"
            )

    def joined(self, *, facts: Mapping[str, str], problem: str = "", timeout: float) -> JoinedRanks:
        """The ranks, not met yet."""
        return JoinedRanks(
            rank=self.rank,
            size=self.size,
            local_rank=self.local_rank,
            point=self.point,
            facts=facts,
            problem=problem,
            timeout=timeout,
        )


def find_launched(environment: Mapping[str, str]) -> Launched | None:
    """What torchrun (RANK, WORLD_SIZE) or srun (SLURM_NTASKS > 1) started here; None where no launcher did.

    Args:
        environment: variables of this process.

    Raises:
        ValueError: variables missing, or no numbers. No communication before.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names, unset = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "RANK and WORLD_SIZE"
    elif environment.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in environment:
        names, unset = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"), "SLURM_PROCID"
    else:
        return None
    remedy = SPAWN.format(unset=unset)
    rank, size, local_rank = (_number(environment, name, remedy) for name in names)
    if not rank < size:
        raise ValueError(f"{names[0]} = {rank} with {names[1]} = {size}; it has to be below; {remedy}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise ValueError(
                f"{names[0]} is set, but {name} is not; ranks meet at one address: export MASTER_ADDR (the "
                f"first node) and MASTER_PORT (a free port) for all of them; {remedy}"
            )
    port = _number(environment, "MASTER_PORT", remedy)
    if port > MOST_PORT:
        raise ValueError(f"MASTER_PORT is {port}; it has to be at most {MOST_PORT}, e.g. 29500; {remedy}")
    _check_device(rank, local_rank, names[2])
    # torchrun's agent has a store there that outlives a restart of the ranks.
    has_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0") if has_store else "0"
    point = MeetingPoint(
        host=environment["MASTER_ADDR"], port=port, has_store=has_store, prefix=f"moe_dispatch/{attempt}"
    )
    return Launched(rank=rank, size=size, local_rank=local_rank, launcher=(names[1], unset), point=point)


def find_ranks(
    launched: Launched | None, *, size: int, facts: Mapping[str, str], timeout: float
) -> SpawnedRanks | JoinedRanks:
    """The launched ranks, else our own.

    Args:
        size: the ranks that the config wants.
        facts: what launched ranks have to agree about, by name.
        timeout: seconds for one call of ``run``, and for launched ranks to meet.

    Raises:
        ValueError: not ``size`` ranks were launched, or more than this machine can have. No communication before.
    """
    if launched:
        launched.check_size(size)
        return launched.joined(facts=facts, timeout=timeout)
    if size > MOST_SPAWNED:
        raise ValueError(
            f"the config has ranks = {size}; this command spawns at most {MOST_SPAWNED} on one machine: "
            "start more with torchrun or srun, or lower ranks"
        )
    return SpawnedRanks(size, timeout=timeout)


def _number(environment: Mapping[str, str], name: str, remedy: str) -> int:
    value = environment.get(name, "")
    if not (value.isdecimal() and value.isascii()):
        fact = f"{name} is {value!r}" if name in environment else f"{name} is not set"
        raise ValueError(f"{fact}; a started rank needs it as a number: launch with torchrun or srun; {remedy}")
    return int(value)


def _check_device(rank: int, local_rank: int, name: str) -> None:
    devices = torch.cuda.device_count()
    if torch.cuda.is_available() and local_rank >= devices:
        raise ValueError(
            f"rank {rank} has {name} = {local_rank}, but its node has {devices} CUDA devices; a rank needs "
            f"its own: start at most {devices} ranks per node, or set CUDA_VISIBLE_DEVICES= to run on CPUs"
        )
