"""The command: a whole run, a run that fails, and wrong input."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from moe_dispatch.lab import cli
from moe_dispatch.lab.bench import command
from moe_dispatch.lab.bench.config import WorkloadConfig
from moe_dispatch.lab.bench.memory import ALLOCATOR
from moe_dispatch.lab.bench.results import WorkloadResult
from moe_dispatch.testing import RankThreads

ADAPTERS = "tests.support.lab.adapters"
PNG = b"\x89PNG"


def test_a_run_prints_a_table_and_writes_json_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_path, plot_path = tmp_path / "out.json", tmp_path / "out.png"
    before = dict(os.environ)
    argv = ["bench", "bench_tiny", "--repeat", "2", "--workloads", "uneven, Zipf", "--adapter", f"{ADAPTERS}:Careful"]
    assert cli.main([*argv, "--json", str(json_path), "--plot", str(plot_path), "--profile"]) == 0
    assert dict(os.environ) == before
    out = capsys.readouterr().out
    for row in ("ours", "textbook", "Careful", "rank floor", "planned floor", "choice floor"):
        assert re.search(rf"{row} +\d+\.\d \(\d+\.\d\) +\d", out), (row, out)
    assert "uneven, Zipf: 2 ranks, tokens 48+0, D 16, E 5, K 3, bfloat16, Zipf 1" in out
    assert all(f"{name}={value}" in out for name, value in ALLOCATOR)
    assert f"torch {torch.__version__}" in out
    assert re.search(r"exchange +\d+\.\d ms +\d+%", out)
    assert plot_path.read_bytes().startswith(PNG)
    document = json.loads(json_path.read_text())
    assert document["passed"] is True
    assert (document["status"], document["stopped"]) == (0, "")
    assert document["command"].startswith("moe-dispatch bench bench_tiny --repeat 2 --workloads 'uneven, Zipf' ")
    assert {"moe_dispatch", "commit", "host", "platform", "date", "python", "torch"} <= document.keys()
    (workload,) = document["workloads"]
    ours, weighing, textbook, careful, *floors = workload["lines"]
    assert weighing["name"] == "experts weigh"
    assert [floor["name"] for floor in floors] == ["rank floor", "planned floor", "choice floor"]
    assert ours["forward"] == careful["forward"]
    assert (ours["forward"]["collectives"], ours["forward"]["host_syncs"]) == (3, 1)
    assert (ours["backward"]["collectives"], ours["backward"]["host_syncs"]) == (2, 0)
    assert len(textbook["both_ms"]) == 2
    assert all(both > forward > 0 for both, forward in zip(ours["both_ms"], ours["forward_ms"], strict=True))


@pytest.mark.parametrize(
    ("adapter", "status", "told"),
    [
        ("Unweighted", 1, r"\n  Unweighted was refused: rank 0: the output is off by "),
        ("Raises", 3, r"\n  broke off: measure failed on \d of 2 ranks[\s\S]*no such kernel"),
    ],
)
def test_a_wrong_contender_fails_the_run(
    adapter: str, status: int, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "RankPool", RankThreads)  # which cost no time to start
    argv = ["bench", "bench_tiny", "--repeat", "1", "--workloads", "even", "--adapter", f"{ADAPTERS}:{adapter}"]
    assert cli.main(argv) == status
    assert re.search(told, capsys.readouterr().out)


def test_a_signal_ends_the_run_with_the_workloads_that_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run_workload(workload: WorkloadConfig, _: object) -> WorkloadResult:
        if workload.name == "uneven, Zipf":
            signal.raise_signal(signal.SIGTERM)
        return WorkloadResult(name=workload.name, kind="dispatch", shape="any")

    monkeypatch.setattr(command, "run_workload", run_workload)
    path = tmp_path / "out.json"
    argv = ["bench", "bench_tiny", "--workloads", "even", "uneven, Zipf", "--json", str(path)]
    assert cli.main(argv) == 143
    assert "moe-dispatch: interrupted by SIGTERM\n" in capsys.readouterr().err
    document = json.loads(path.read_text())
    assert (document["passed"], document["stopped"]) == (False, "interrupted by SIGTERM")
    assert [workload["name"] for workload in document["workloads"]] == ["even"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (
            ["none"],
            r"config none does not exist; name a TOML file, or a packaged config: 'attention', 'bench', 'bench_",
        ),
        (["bench_tiny", "--adapter", "none"], r"adapter 'none' is not of the form package.module:Name"),
        (
            ["bench_tiny", "--adapter", "no_such.module:Name"],
            r"adapter .* cannot be imported \(No module named 'no_such'",
        ),
        (["bench_tiny", "--adapter", f"{ADAPTERS}:Missing"], r"Missing does not exist; see"),
        (["bench_tiny", "--adapter", f"{ADAPTERS}:NO_CLASS"], r"NO_CLASS is no class with a method forward"),
        (
            ["bench_tiny", "--adapter", f"{ADAPTERS}:Odd"],
            r'has kind = \'attentive\'; it has to be "dispatch", "ulysses" or "attention"',
        ),
        (["bench_tiny", "--workloads", "evn"], r"no workload of the config is named 'evn'; .*did you mean 'even'"),
        (["bench_tiny", "--plot", "out.doc"], r"out.doc is no file type for a plot"),
        (["bench_tiny", "--json", "none/out.json"], r"none/out.json cannot be written: the folder"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(command, "run_workload")
    assert cli.main(["bench", *argv]) == 2
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5"])
def test_repetitions_have_to_be_a_number_above_0(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--repeat", text])
    assert f"{text!r} is not a whole number above 0" in capsys.readouterr().err
