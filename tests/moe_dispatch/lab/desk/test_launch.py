"""Where ranks come from: spawned, or those of a launcher."""

import os
import re

import pytest
import torch
import torch.distributed as dist

from moe_dispatch.lab.desk.launch import JoinedRanks, SpawnedRanks, find_ranks
from tests.support.lab.launches import SLURM, TORCHRUN, free_ports


def test_without_a_launcher_ranks_are_spawned() -> None:
    for environment in ({}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {"MASTER_ADDR": "x"}):
        ranks = find_ranks(environment, size=3, timeout=5)
        assert isinstance(ranks, SpawnedRanks)
        assert (ranks.size, ranks.timeout, ranks.is_main) == (3, 5, True)


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM])
def test_the_ranks_of_a_launcher_are_joined(environment: dict[str, str]) -> None:
    assert find_ranks(environment, size=2, timeout=5) == JoinedRanks(rank=1, size=2, local_rank=1)


def test_a_joined_rank_is_in_the_process_group_while_the_context_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": free_ports(1)[0]}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    with find_ranks(os.environ, size=1, timeout=5) as ranks:
        assert ranks.is_main
        assert ranks.run(dist.get_world_size) == 1
    assert not dist.is_initialized()


SPAWN_TORCHRUN = "to have validate spawn its ranks instead, unset RANK and WORLD_SIZE"
SPAWN_SLURM = "to have validate spawn its ranks instead, unset SLURM_PROCID"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            TORCHRUN | {"WORLD_SIZE": "4"},
            "4 ranks were started (WORLD_SIZE), but the config has ranks = 2; start 2, or set ranks = 4 "
            "in a config; " + SPAWN_TORCHRUN,
        ),
        (
            SLURM | {"SLURM_NTASKS": "3"},
            "3 ranks were started (SLURM_NTASKS), but the config has ranks = 2; start 2, or set ranks = 3 "
            "in a config; " + SPAWN_SLURM,
        ),
        (
            {"RANK": "0"},
            "WORLD_SIZE is not set; a started rank needs it as a number: launch with torchrun or srun; "
            + SPAWN_TORCHRUN,
        ),
        (
            TORCHRUN | {"LOCAL_RANK": "x"},
            "LOCAL_RANK is 'x'; a started rank needs it as a number: launch with torchrun or srun; " + SPAWN_TORCHRUN,
        ),
        (TORCHRUN | {"RANK": "2"}, "RANK = 2 with WORLD_SIZE = 2; it has to be below; " + SPAWN_TORCHRUN),
        (
            SLURM | {"MASTER_ADDR": ""},
            "SLURM_PROCID is set, but MASTER_ADDR is not; ranks meet at one address: export MASTER_ADDR (the "
            "first node) and MASTER_PORT (a free port) for all of them; " + SPAWN_SLURM,
        ),
        (
            TORCHRUN | {"MASTER_PORT": "http"},
            "MASTER_PORT is 'http'; a started rank needs it as a number: launch with torchrun or srun; "
            + SPAWN_TORCHRUN,
        ),
    ],
)
def test_a_launch_that_cannot_work_is_refused_on_each_rank_by_itself(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_ranks(environment, size=2, timeout=5)


def test_more_ranks_than_devices_on_a_node_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = "rank 1 has LOCAL_RANK = 1, but its node has 1 CUDA devices; a rank needs its own: start at most 1"
    with pytest.raises(ValueError, match=message):
        find_ranks(TORCHRUN, size=2, timeout=5)
