"""The command line around the main job: what it runs, how it exits; wrong input is told before it starts."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_dispatch.lab import cli
from moe_dispatch.lab.desk import launch
from moe_dispatch.lab.desk.launch import JoinedRanks, SpawnedRanks, find_ranks
from moe_dispatch.lab.validate import command, matrix
from moe_dispatch.lab.validate.config import RowConfig, ValidateConfig
from moe_dispatch.lab.validate.mutants.mutants import MUTANTS
from moe_dispatch.lab.validate.results import RowResult
from moe_dispatch.testing import RankError
from tests.support.made_up_results import AGREEING, differing

ROOT = Path(__file__).parents[4]
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"} | {
    name: TORCHRUN[name] for name in ("MASTER_ADDR", "MASTER_PORT")
}


@dataclass
class Script:
    """Stands in for the ranks: what each row finds, and what was asked of it."""

    results: dict[tuple[str, str], str] = field(default_factory=dict)  # (row, mutant) -> quantity, or "raise"
    calls: list[tuple[str, str, str]] = field(default_factory=list)  # (row, dtype, mutant)
    references: list[tuple[int, int, str]] = field(default_factory=list)
    launches: set[tuple[int, float]] = field(default_factory=set)  # (ranks, timeout)

    def run_reference(self, config: ValidateConfig, row: RowConfig, dtype: str, text: bytes) -> str:
        self.references.append((row.batch, row.seq, dtype))
        return f"reference {row.batch} {row.seq} {dtype}"

    def run_row(
        self, config: ValidateConfig, row: RowConfig, dtype: str, text: bytes, reference: str, mutant: str
    ) -> RowResult:
        assert reference == f"reference {row.batch} {row.seq} {dtype}"
        self.calls.append((row.name, dtype, mutant))
        result = replace(AGREEING, name=row.name, dtype=dtype, mesh=row.mesh, shape=(row.batch, row.seq))
        found = self.results.get((row.name, mutant), "")
        if found == "raise":
            raise RankError("rank 1 raised\nsomething")
        return differing(result, found, 0.5) if found else result


@dataclass
class PoolInProcess:
    """A RankPool without ranks."""

    script: Script

    def __enter__(self) -> "PoolInProcess":
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, fn: Callable[..., Any], ranks: int, *args: Any, timeout: float) -> list[Any]:
        self.script.launches.add((ranks, timeout))
        return [fn(*args)] * ranks


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()
    monkeypatch.setattr(matrix, "run_reference", script.run_reference)
    monkeypatch.setattr(matrix, "run_row", script.run_row)
    monkeypatch.setattr(launch, "RankPool", lambda: PoolInProcess(script))
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)
    return script


ROWS = ("FSDP2 x2", "FSDP2 x2 + EP2", "TP2 + EP2")  # of tiny
MUTANT = next(iter(MUTANTS))
MUTANTS_ANYWHERE = (  # in plain data parallelism too
    "weights-twice",
    "gradients-averaged",
    "stale-plan",
    "weights-without-gradient",
    "bias-in-weights",
    "weights-in-bfloat16",
)


def test_all_rows_run_in_every_dtype_against_one_reference_per_shape(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["validate", "tiny"]) == 0
    assert script.calls == [(name, dtype, "") for dtype in ("float32", "float64") for name in ROWS]
    assert script.references == [(3, 17, "float32"), (3, 17, "float64")]
    out, err = capsys.readouterr()
    assert out.count(" agree ") == 6
    assert out.count("one process") == 2
    assert err.splitlines()[0] == "float32  FSDP2 x2  agree  1.2 s"
    assert len(err.splitlines()) == 6


def test_default_config_is_the_debug_model(script: Script) -> None:
    assert cli.main(["validate"]) == 0
    assert len(script.calls) == 2 * 29
    assert script.launches == {(4, 300.0)}
    assert script.references[:3] == [(3, 129, "float32"), (1, 129, "float32"), (3, 3, "float32")]


def test_one_row_that_differs_fails_the_run(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.results["TP2 + EP2", ""] = "gradients"
    assert cli.main(["validate", "tiny", "--rows", "FSDP2 x2", "TP2 + EP2"]) == 1
    assert [call[0] for call in script.calls] == ["FSDP2 x2", "TP2 + EP2"] * 2
    out, err = capsys.readouterr()
    assert "DIFFERS: gradients" in out
    assert "float64  TP2 + EP2  differ: gradients  1.2 s" in err


def test_a_row_that_breaks_off_fails_the_run_and_the_next_still_runs(
    script: Script, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script.results["FSDP2 x2", ""] = "raise"
    path = tmp_path / "out.json"
    assert cli.main(["validate", "tiny", "--json", str(path)]) == 1
    assert len(script.calls) == 6
    out, _ = capsys.readouterr()
    assert out.count("ERROR") == 2
    assert "FSDP2 x2, float32, broke off: rank 1 raised\nsomething" in out
    row = json.loads(path.read_text())["rows"][0]
    assert (row["error"], row["shape"], row["mesh"]) == (
        "rank 1 raised\nsomething",
        [3, 17],
        "dp 2, sp 1, tp 1, ep 1",
    )


def test_json_and_plot_are_written_after_a_run(script: Script, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"x" * 18)
    names = [str(tmp_path / name) for name in ("text", "out.json", "out.png")]
    argv = ["validate", "tiny", "--text", names[0], "--json", names[1], "--plot", names[2], "--timeout", "7"]
    assert cli.main(argv) == 0
    assert script.launches == {(2, 7.0)}
    assert json.loads(Path(names[1]).read_text())["passed"]
    assert Path(names[2]).stat().st_size > 10_000
    assert sorted(os.listdir(tmp_path)) == ["out.json", "out.png", "text"]


def test_a_mutant_that_is_caught_fails_the_run_and_names_the_quantity(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.results["TP2 + EP2", MUTANT] = "loss curve"
    assert cli.main(["validate", "tiny", "--mutant", MUTANT]) == 1
    assert {call[2] for call in script.calls} == {MUTANT}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"mutant {MUTANT} ({MUTANTS[MUTANT].description}): the run fails, as it has to; differing: loss curve"
    )


def test_a_mutant_that_every_row_agrees_with_is_missed(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "tiny", "--mutant", MUTANT]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("MISSED, every row agrees")


def test_mutants_run_where_they_can_show_until_caught_in_float64(script: Script, tmp_path: Path) -> None:
    for name in MUTANTS:
        script.results["FSDP2 x2 + EP2", name] = script.results["TP2 + EP2", name] = "logits"
    script.results["FSDP2 x2 + EP2", "weights-twice"] = ""  # goes on to the next row
    path = tmp_path / "out.json"
    assert cli.main(["validate", "tiny", "--mutants", "--json", str(path)]) == 0
    rows_of = {name: [row for row, _, mutant in script.calls if mutant == name] for name in MUTANTS}
    assert rows_of["weights-twice"] == ["FSDP2 x2 + EP2", "TP2 + EP2"]
    assert rows_of["stale-plan"] == ["FSDP2 x2 + EP2"]
    assert rows_of["gather-without-sum"] == ["TP2 + EP2"]  # there is nothing to gather elsewhere
    assert {dtype for _, dtype, _ in script.calls} == {"float64"}
    assert len([row for row, _, mutant in script.calls if not mutant]) == 2  # controls run once
    assert len(json.loads(path.read_text())["mutants"]) == len(MUTANTS)


def test_a_missed_mutant_fails_the_run_of_all(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    for name in MUTANTS_ANYWHERE[1:]:
        script.results["FSDP2 x2", name] = "logits"
    assert cli.main(["validate", "tiny", "--mutants", "--rows", "FSDP2 x2"]) == 1
    assert capsys.readouterr().out.count("MISSED") == 1


def test_a_mutant_that_can_show_in_none_of_the_rows_is_not_run(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in MUTANTS_ANYWHERE:
        script.results["FSDP2 x2", name] = "logits"
    assert cli.main(["validate", "tiny", "--mutants", "--rows", "FSDP2 x2"]) == 0
    assert {mutant for _, _, mutant in script.calls} == {"", *MUTANTS_ANYWHERE}
    assert capsys.readouterr().out.count("none in which it could show") == len(MUTANTS) - len(MUTANTS_ANYWHERE)


WRONG_INPUT = [
    (
        ["none.toml"],
        "config none.toml does not exist; name a TOML file, or a packaged config: 'deepseek_v3_debug', 'ti",
    ),
    (
        ["tyni"],
        "config tyni does not exist; name a TOML file, or a packaged config: .* (did you mean 'tiny'?)",
    ),
    (["elsewhere/tiny.toml"], "config elsewhere/tiny.toml does not exist"),
    (["tests"], "config tests is a directory; name a TOML file"),
    (
        ["tiny", "--rows", "TP2"],
        "no row of the config is named 'TP2'; choose from: 'FSDP2 x2', .* (did you mean ",
    ),
    (["tiny", "--mutant", "nope"], f"no mutant is named 'nope'; choose from: '{MUTANT}', "),
    (["tiny", "--text", "none"], "text none does not exist; name a file with some text"),
    (["tiny", "--text", "short"], "the text has 16 bytes; a row of seq = 17 tokens does not fit"),
    (["tiny", "--json", "none/out.json"], "none/out.json cannot be written: the folder"),
    (["tiny", "--plot", "none/out.png"], "none/out.png cannot be written: the folder"),
    (["tiny", "--plot", "out.doc"], "out.doc is no file type for a plot; its name has to end in one of"),
    (
        ["tiny", "--mutants", "--plot", "out.png"],
        "--plot draws one run of the matrix; leave it out with --mutants",
    ),
    (["bad.toml"], "config bad.toml is not valid TOML"),
]


@pytest.mark.parametrize(
    ("argv", "message"), WRONG_INPUT, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_wrong_input_is_one_message_and_status_2_before_anything_runs(
    script: Script,
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "short").write_bytes(b"x" * 16)
    (tmp_path / "bad.toml").write_text("=")
    before = sorted(os.listdir())
    assert cli.main(["validate", *argv]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("moe-dispatch: ")
    for part in message.split(".*"):
        assert part in err
    assert (out, script.calls, script.references, sorted(os.listdir())) == ("", [], [], before)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["validate", "--timeout", "0"], "'0' is not a number of seconds above 0, e.g. 300"),
        (["validate", "--timeout", "soon"], "'soon' is not a number of seconds above 0, e.g. 300"),
        (["validate", "--mutants", "--mutant", "x"], "not allowed with argument"),
    ],
)
def test_wrong_usage_exits_with_status_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny", "tiny.toml", "configs/tiny.toml", "configs/tiny"])
def test_a_packaged_config_is_found_from_everywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.find_config(name) == ROOT / "configs" / "tiny.toml"
    (tmp_path / "configs").mkdir()
    for path in (
        tmp_path / "tiny",
        tmp_path / "tiny.toml",
        tmp_path / "configs/tiny.toml",
        tmp_path / "configs/tiny",
    ):
        path.touch()
    assert command.find_config(name) == Path(name)  # the file as given comes first


def test_configs_of_a_wheel_come_before_those_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, checkout = tmp_path / "wheel", tmp_path / "checkout"
    monkeypatch.setattr(command, "CONFIG_FOLDERS", (wheel, checkout))
    for path in (wheel / "tiny.toml", checkout / "tiny.toml", checkout / "other.toml"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert command.find_config("tiny") == wheel / "tiny.toml"
    assert command.find_config("other") == checkout / "other.toml"


@pytest.mark.parametrize(
    ("gone", "argv", "extra"), [("rich", [], "cli"), ("matplotlib", ["--plot", "out.png"], "plot")]
)
def test_a_missing_extra_is_told_with_the_command_that_installs_it(
    gone: str,
    argv: list[str],
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == gone else importlib.util.find_spec(name))
    assert cli.main(["validate", "tiny", *argv]) == 2
    install = f'pip install "moe-dispatch[{extra}]"'
    message = f"moe-dispatch: {gone} cannot be imported, which this command needs; run: {install}\n"
    assert capsys.readouterr().err == message


def test_an_interrupt_ends_without_a_traceback(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(matrix, "run_row", interrupt)
    assert cli.main(["validate", "tiny"]) == 130
    assert capsys.readouterr().err == "moe-dispatch: interrupted\n"


def test_a_file_that_cannot_be_written_in_the_end_is_told(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    assert cli.main(["validate", "tiny", "--json", str(tmp_path / "out.json")]) == 2
    out, err = capsys.readouterr()
    assert out.count(" agree ") == 6
    assert "was not written (No space left on device)" in err
    assert os.listdir(tmp_path) == []


def test_importing_the_library_or_the_command_line_imports_no_extra() -> None:
    code = "import sys, moe_dispatch.lab.cli; print({'pydantic', 'rich', 'matplotlib'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout == "set()\n"


# --- where ranks come from ---


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_without_a_launcher_ranks_are_spawned() -> None:
    for environment in ({}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {"MASTER_ADDR": "x"}):
        ranks = find_ranks(environment, size=3, timeout=5)
        assert isinstance(ranks, SpawnedRanks)
        assert (ranks.size, ranks.timeout, ranks.is_main) == (3, 5, True)


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM])
def test_the_ranks_of_a_launcher_are_joined(environment: dict[str, str]) -> None:
    assert find_ranks(environment, size=2, timeout=5) == JoinedRanks(rank=1, size=2, local_rank=1)


def test_a_joined_rank_is_in_the_process_group_while_the_context_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": free_port()}
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
