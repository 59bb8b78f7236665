"""Where ranks come from: spawned here, or started by torchrun or Slurm and joined."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

import torch
import torch.distributed as dist

from ...testing import RankPool
from ...testing.worlds import MadeGroups

T = TypeVar("T")

SPAWN = "to have validate spawn its ranks instead, unset {unset}"


class Ranks(Protocol):
    """The ranks of a run, as a context manager."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
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

    def run(self, fn: Callable[..., T], *args: Any) -> T:
        return self._pool.run(fn, self.size, *args, timeout=self.timeout)[0]

    def __enter__(self) -> Self:
        self._pool.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.__exit__(*exception)


@dataclass(slots=True, kw_only=True)
class JoinedRanks:
    """This process is one of ``size`` ranks that a launcher started.

    NCCL where there is CUDA, with gloo for tensors on the CPU, else gloo alone. Groups that a call of ``run`` makes
    are destroyed after it. An exception leaves the context without touching a group: peers that wait for this rank
    fail once the process has ended.
    """

    rank: int
    size: int
    local_rank: int
    _made: MadeGroups = field(init=False, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def run(self, fn: Callable[..., T], *args: Any) -> T:
        result = fn(*args)
        dist.barrier()  # a rank that destroyed its groups while a peer still used them would break its connection
        self._made.destroy()
        return result

    def __enter__(self) -> Self:
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(self.local_rank)
        dist.init_process_group(backend, init_method="env://", rank=self.rank, world_size=self.size)
        self._made = MadeGroups()
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            dist.destroy_process_group()


def find_ranks(environment: Mapping[str, str], *, size: int, timeout: float) -> SpawnedRanks | JoinedRanks:
    """The ranks that torchrun (RANK, WORLD_SIZE) or srun (SLURM_NTASKS > 1) started, else our own.

    Args:
        environment: variables of this process.
        size: the ranks that the config wants.
        timeout: seconds for one call of ``run``; for spawned ranks.

    Raises:
        ValueError: variables missing or no numbers, or not ``size`` ranks. No communication before.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names, unset = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "RANK and WORLD_SIZE"
    elif environment.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in environment:
        names, unset = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"), "SLURM_PROCID"
    else:
        return SpawnedRanks(size, timeout=timeout)
    remedy = SPAWN.format(unset=unset)
    rank, world_size, local_rank = (_number(environment, name, remedy) for name in names)
    if not rank < world_size:
        raise ValueError(f"{names[0]} = {rank} with {names[1]} = {world_size}; it has to be below; {remedy}")
    if world_size != size:
        raise ValueError(
            f"{world_size} ranks were started ({names[1]}), but the config has ranks = {size}; "
            f"start {size}, or set ranks = {world_size} in a config; {remedy}"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise ValueError(
                f"{names[0]} is set, but {name} is not; ranks meet at one address: export MASTER_ADDR (the "
                f"first node) and MASTER_PORT (a free port) for all of them; {remedy}"
            )
    _number(environment, "MASTER_PORT", remedy)
    _check_device(rank, local_rank, names[2])
    return JoinedRanks(rank=rank, size=size, local_rank=local_rank)


def _number(environment: Mapping[str, str], name: str, remedy: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
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
