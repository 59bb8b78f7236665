"""`validate` in two processes, as torchrun starts them."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.lab.configs import ROOT
from tests.support.lab.launches import TORCHRUN, free_ports

# Two commands, as it takes seconds to start a process. The first ends well; in the second, rank 1 fails.
JOINED = """
import os, sys, torch
import torch.distributed as dist
from dataclasses import replace
from moe_dispatch import build_mesh
from moe_dispatch.lab.cli import main
from moe_dispatch.lab.validate import matrix
from tests.support.lab.made_up_results import AGREEING

good, bad, other_port = sys.argv[1:]

def run_row(config, row, dtype, text, reference, mutant):
    if os.environ["MASTER_PORT"] == other_port and dist.get_rank() == 1:
        raise RuntimeError("rank 1 fails")
    threads = len(os.listdir("/proc/self/task"))
    mesh, total = build_mesh(dp=2, ep=2, device_type="cpu"), torch.ones(())
    dist.all_reduce(total, group=mesh.expert.get_group("ep"))
    assert len(os.listdir("/proc/self/task")) > threads
    return replace(AGREEING, name=f"{row.name} on {int(total)} ranks with {threads} threads", dtype=dtype)

matrix.run_reference = lambda *_: None
matrix.run_row = run_row
print("status", main(["validate", "tiny", "--json", good]), flush=True)
print("second", file=sys.stderr, flush=True)
os.environ["MASTER_PORT"] = other_port
sys.exit(main(["validate", "tiny", "--rows", "TP2 + EP2", "--json", bad]))
"""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What two ranks printed, and where they wrote. ``first`` and ``second`` are (stdout, stderr) of each rank."""

    first: list[tuple[str, str]]
    second: list[tuple[str, str]]
    statuses: list[int]
    good: Path
    bad: Path


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Two ranks that run JOINED, as torchrun would start them."""
    good, bad = (tmp_path_factory.mktemp(name) / "out.json" for name in ("good", "bad"))
    port, other_port = free_ports(2)
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", JOINED, str(good), str(bad), other_port],
            cwd=ROOT,
            env=os.environ | TORCHRUN | {"MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    parts = [(out.partition("status 0\n"), err.partition("second\n")) for out, err in outputs]
    assert all(mark for part in parts for _, mark, _ in part), outputs
    return Launch(
        first=[(out[0], err[0]) for out, err in parts],
        second=[(out[2], err[2]) for out, err in parts],
        statuses=[process.returncode for process in processes],
        good=good,
        bad=bad,
    )


def test_joined_ranks_run_together_and_only_the_main_one_tells(launch: Launch) -> None:
    (out, err), other = launch.first
    assert out.count("TP2 + EP2 on 2 ranks") == 2
    assert len(err.splitlines()) == 6
    assert len(set(re.findall(r"with \d+ threads", out))) == 1  # groups go with the row that made them
    assert other == ("", "")
    assert json.loads(launch.good.read_text())["passed"]


def test_an_exception_on_one_joined_rank_ends_all_with_status_1(launch: Launch) -> None:
    (out, _), (_, err) = launch.second
    assert (launch.statuses, out) == ([1, 1], "")
    assert "RuntimeError: rank 1 fails" in err
    assert os.listdir(launch.bad.parent) == []
