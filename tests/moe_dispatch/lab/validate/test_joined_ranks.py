"""`validate` in two processes, as torchrun starts them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.configs import ROOT
from tests.support.launches import TORCHRUN, free_port

JOINED = """
import sys, torch
import torch.distributed as dist
from dataclasses import replace
from moe_dispatch.lab.cli import main
from moe_dispatch.lab.validate import matrix
from tests.support.made_up_results import AGREEING

def run_row(config, row, dtype, text, reference, mutant):
    if "--rows" in sys.argv and dist.get_rank() == 1:
        raise RuntimeError("rank 1 fails")
    total = torch.ones(())
    dist.all_reduce(total)
    return replace(AGREEING, name=f"{row.name} on {int(total)} ranks", dtype=dtype)

matrix.run_reference = lambda *_: None
matrix.run_row = run_row
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def two_processes(argv: list[str]) -> Iterator[list[tuple[int, str, str]]]:
    """(status, stdout, stderr) of two ranks that run JOINED, as torchrun would start them."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", JOINED, *argv],
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
        yield [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()


def test_joined_ranks_run_together_and_only_the_main_one_tells(tmp_path: Path) -> None:
    with two_processes(["validate", "tiny", "--json", str(tmp_path / "out.json")]) as (
        (main, out, err),
        other,
    ):
        assert main == 0, err
        assert out.count("TP2 + EP2 on 2 ranks") == 2
        assert len(err.splitlines()) == 6
        assert other == (0, "", "")
        assert json.loads((tmp_path / "out.json").read_text())["passed"]


def test_an_exception_on_one_joined_rank_ends_all_with_status_1(tmp_path: Path) -> None:
    argv = ["validate", "tiny", "--rows", "TP2 + EP2", "--json", str(tmp_path / "out.json")]
    with two_processes(argv) as ((main, out, _), (other, _, err)):
        assert (main, other, out) == (1, 1, "")
        assert "RuntimeError: rank 1 fails" in err
        assert os.listdir(tmp_path) == []
