"""`validate` in two processes, as torchrun starts them."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.lab.configs import ROOT, TINY_TEXT
from tests.support.lab.launches import TORCHRUN, free_ports

# Three commands, as it takes seconds to start a process. The first ends well; the ranks of the second mean other
# configs; in the third, rank 1 fails.
JOINED = """
import os, sys, torch
import torch.distributed as dist
from dataclasses import replace
from moe_dispatch import build_mesh
from moe_dispatch.lab.cli import main
from moe_dispatch.lab.validate import matrix
from tests.support.lab.made_up_results import AGREEING

good, bad, other_config, *ports = sys.argv[1:]
rank = os.environ["RANK"]

def run_row(config, row, dtype, token_SBL, reference, mutant):
    if os.environ["MASTER_PORT"] == ports[-1] and rank == "1":
        raise RuntimeError("rank 1 fails")
    threads = len(os.listdir("/proc/self/task"))
    mesh, total = build_mesh(dp=2, ep=2, device_type="cpu"), torch.ones(())
    dist.all_reduce(total, group=mesh.expert.get_group("ep"))
    assert len(os.listdir("/proc/self/task")) > threads
    return replace(AGREEING, name=f"{row.name} on {int(total)} ranks with {threads} threads", dtype=dtype)

def command(*argv):
    os.environ["MASTER_PORT"] = ports.pop(0)
    print("status", main(["validate", *argv]))
    for stream in (sys.stdout, sys.stderr):
        print("next", file=stream, flush=True)

matrix.run_reference = lambda *_: None
matrix.run_row = run_row
command("tiny", "--json", good)
command("tiny" if rank == "0" else other_config)
os.environ["MASTER_PORT"] = ports[0]
sys.exit(main(["validate", "tiny", "--rows", "TP2 + EP2", "--json", bad]))
"""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What two ranks printed in each command, (stdout, stderr), and where they wrote."""

    commands: list[list[tuple[str, str]]]
    statuses: list[int]  # of the processes, with the last command
    good: Path
    bad: Path


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Two ranks that run JOINED, as torchrun would start them."""
    folder = tmp_path_factory.mktemp("joined")
    good, bad, other_config = folder / "good.json", folder / "bad.json", folder / "other.toml"
    other_config.write_text(TINY_TEXT.replace("steps = 2", "steps = 3"))
    ports = free_ports(3)
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", JOINED, *map(str, (good, bad, other_config)), *ports],
            cwd=ROOT,
            env=os.environ | TORCHRUN | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
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
    assert [(out.count("next\n"), err.count("next\n")) for out, err in outputs] == [(2, 2)] * 2, outputs
    commands = [list(zip(out.split("next\n"), err.split("next\n"), strict=True)) for out, err in outputs]
    return Launch(
        commands=[list(pair) for pair in zip(*commands, strict=True)],
        statuses=[process.returncode for process in processes],
        good=good,
        bad=bad,
    )


def test_joined_ranks_run_together_and_only_the_main_one_tells(launch: Launch) -> None:
    (out, err), other = launch.commands[0]
    assert out.count("TP2 + EP2 on 2 ranks") == 2
    assert len(err.splitlines()) == 6
    threads = [int(count) for count in re.findall(r"with (\d+) threads", out)]
    assert max(threads) - min(threads) <= 1  # groups go, with 3 threads each; that of the call before may be leaving
    assert other == ("status 0\n", "")
    assert json.loads(launch.good.read_text())["passed"]


def test_ranks_with_different_configs_are_one_error_on_all(launch: Launch) -> None:
    first, second = launch.commands[1]
    assert first == second
    out, err = first
    assert out == "status 3\n"
    assert err.startswith("moe-dispatch: the ranks were started differently: ")
    assert "train.steps is 2 on rank [0], 3 on rank [1]" in err
    assert "text is 102 bytes used of " in err


def test_an_exception_on_one_joined_rank_is_told_on_all(launch: Launch) -> None:
    (out, err), (other_out, other_err) = launch.commands[2]
    assert (out, other_out, launch.statuses) == ("", "", [3, 3])
    assert "RuntimeError: rank 1 fails" in other_err
    assert "Traceback" in other_err
    assert err.startswith("moe-dispatch: rank 0: float32  TP2 + EP2 ")
    assert "rank 1 ended: float32  TP2 + EP2 failed (RuntimeError: rank 1 fails)" in err
    document = json.loads(launch.bad.read_text())
    assert (document["passed"], document["status"], document["rows"]) == (False, 3, [])
    assert "rank 1 fails" in document["stopped"]
