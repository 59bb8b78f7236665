"""Where ranks come from: spawned, or those of a launcher."""

import re

import pytest
import torch

from moe_dispatch.lab.desk.ranks.launch import MOST_SPAWNED, SpawnedRanks, find_launched, find_ranks
from tests.support.lab.launches import SLURM, TORCHRUN


def test_without_a_launcher_ranks_are_spawned() -> None:
    for environment in ({}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {"MASTER_ADDR": "x"}):
        ranks = find_ranks(find_launched(environment), size=3, facts={}, timeout=5)
        assert isinstance(ranks, SpawnedRanks)
        assert (ranks.size, ranks.timeout, ranks.is_main) == (3, 5, True)


def test_more_ranks_than_a_machine_can_have_are_refused() -> None:
    find_ranks(None, size=MOST_SPAWNED, facts={}, timeout=5)
    message = (
        "the config has ranks = 65; this command spawns at most 64 on one machine: start more with torchrun or srun"
    )
    with pytest.raises(ValueError, match=message):
        find_ranks(None, size=MOST_SPAWNED + 1, facts={}, timeout=5)


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM])
def test_the_ranks_of_a_launcher_are_found(environment: dict[str, str]) -> None:
    launched = find_launched(environment)
    assert launched
    assert (launched.rank, launched.size, launched.local_rank) == (1, 2, 1)
    assert (str(launched.point), launched.point.has_store) == ("127.0.0.1:29500", False)


def test_a_restart_by_torchrun_begins_anew_in_the_store_of_its_agent() -> None:
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    first, later = (
        find_launched(TORCHRUN | agent | {"TORCHELASTIC_RESTART_COUNT": "0"}),
        find_launched(TORCHRUN | agent),
    )
    assert first
    assert later
    assert first.point.has_store
    assert first.point.prefix != later.point.prefix


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
            TORCHRUN | {"MASTER_PORT": "65536"},
            "MASTER_PORT is 65536; it has to be at most 65535, e.g. 29500; " + SPAWN_TORCHRUN,
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
        find_ranks(find_launched(environment), size=2, facts={}, timeout=5)


def test_more_ranks_than_devices_on_a_node_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = "rank 1 has LOCAL_RANK = 1, but its node has 1 CUDA devices; a rank needs its own: start at most 1"
    with pytest.raises(ValueError, match=message):
        find_launched(TORCHRUN)
