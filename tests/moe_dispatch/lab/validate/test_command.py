"""The command: what it runs, what it prints and how it exits; wrong input is told before anything runs."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dispatch.lab import cli
from moe_dispatch.lab.desk.ranks.presence import Presence
from moe_dispatch.lab.validate import matrix
from moe_dispatch.lab.validate.mutants.mutants import MUTANTS
from moe_dispatch.lab.validate.results import RowResult
from tests.support.lab.launches import TORCHRUN, free_ports
from tests.support.lab.scripted_ranks import Script

ROWS = ("FSDP2 x2", "FSDP2 x2 + EP2", "TP2 + EP2")  # of tiny


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
    assert len(script.calls) == 2 * 41
    assert script.launches == {(4, 300.0)}
    assert script.references[:3] == [(3, 129, "float32"), (1, 129, "float32"), (3, 3, "float32")]


def test_one_row_that_differs_fails_the_run(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.results["TP2 + EP2", ""] = "gradients"
    assert cli.main(["validate", "tiny", "--rows", "FSDP2 x2", "TP2 + EP2"]) == 1
    assert [call[0] for call in script.calls] == ["FSDP2 x2", "TP2 + EP2"] * 2
    out, err = capsys.readouterr()
    assert "DIFFERS" in out
    assert "TP2 + EP2, float64: gradients off by 5.0e-01 (tolerance 1e-10)" in out
    assert "float64  TP2 + EP2  differ: gradients  1.2 s" in err


def test_a_row_that_breaks_off_fails_the_run_and_the_next_still_runs(
    script: Script, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script.results["FSDP2 x2", ""] = "raise"
    path = tmp_path / "out.json"
    assert cli.main(["validate", "tiny", "--json", str(path)]) == 3  # it differs nowhere, but it did not run
    assert len(script.calls) == 6
    out, _ = capsys.readouterr()
    assert out.count("ERROR") == 2
    assert "FSDP2 x2, float32, broke off: rank 1 raised\nsomething" in out
    script.results["TP2 + EP2", ""] = "loss"
    assert cli.main(["validate", "tiny"]) == 1
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


MUTANT = next(iter(MUTANTS))
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
    (["/dev/null"], "config /dev/null is no regular file; name a TOML file"),
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


def test_a_file_that_cannot_be_written_in_the_end_is_told(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert cli.main(["validate", "tiny", "--json", str(tmp_path / "out.json")]) == 3
    out, err = capsys.readouterr()
    assert out.count(" agree ") == 6
    assert err.endswith(f"\nmoe-dispatch: {tmp_path}/out.json was not written (No space left on device)\n")
    assert os.listdir(tmp_path) == []


def test_a_plot_that_cannot_be_written_is_told_after_the_json(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.png").symlink_to("/dev/full")
    argv = ["validate", "tiny", "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert cli.main(argv) == 3
    assert capsys.readouterr().err.endswith("/out.png was not written (No space left on device)\n")
    assert json.loads((tmp_path / "out.json").read_text())["passed"]


def test_a_table_that_cannot_be_written_is_told(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = Path("/dev/full").open("w")  # noqa: SIM115  (it is closed when nothing is left to write)
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["validate", "tiny"]) == 3
    assert capsys.readouterr().err.endswith("moe-dispatch: the output: No space left on device\n")
    stream.close()  # Python does so at its exit: now it goes nowhere


def test_json_on_standard_output_is_alone_there(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "tiny", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["command"] == "moe-dispatch validate tiny --json -"
    assert document["text"]["bytes"] > 400_000
    assert err.count(" agree ") == 12  # each row as it ends, and in the table


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("finished", [0, 2])
def test_a_signal_ends_the_run_with_the_rows_that_finished(
    number: signal.Signals,
    status: int,
    finished: int,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def run_row(*args: Any) -> RowResult:
        if len(script.calls) == finished:
            signal.raise_signal(number)
        return script.run_row(*args)

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(matrix, "run_row", run_row)
    paths = [tmp_path / name for name in ("out.json", "out.png")]
    argv = ["validate", "tiny", "--json", str(paths[0]), "--plot", str(paths[1])]
    assert cli.main(argv) == status
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    out, err = capsys.readouterr()
    assert out.count(" agree ") == finished
    assert err.endswith(f"moe-dispatch: interrupted by {number.name}\n")
    assert not paths[1].exists()  # a plot does not say that it is of a part
    document = json.loads(paths[0].read_text())
    assert not document["passed"]
    assert (document["stopped"], document["status"]) == (f"interrupted by {number.name}", status)
    assert document["status_means"] == f"interrupted by {number.name}"
    assert len(document["rows"]) == finished


def test_a_signal_during_the_mutants_ends_them_too(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_row(*args: Any) -> RowResult:
        if len(script.calls) == 4:
            raise KeyboardInterrupt
        return script.run_row(*args)

    for name in MUTANTS:
        script.results["TP2 + EP2", name] = "logits"
    monkeypatch.setattr(matrix, "run_row", run_row)
    path = tmp_path / "out.json"
    assert cli.main(["validate", "tiny", "--mutants", "--json", str(path)]) == 130
    document = json.loads(path.read_text())
    assert (document["passed"], document["stopped"]) == (False, "interrupted by SIGINT")
    assert 0 < len(document["mutants"]) < len(MUTANTS)
    assert "caught" in capsys.readouterr().out


def test_a_model_that_does_not_fit_in_memory_is_told(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "run_reference_of", lambda *_: torch.empty(2**60))
    assert cli.main(["validate", "tiny"]) == 3
    told = "moe-dispatch: row 'FSDP2 x2' does not fit in memory; make its batch, seq or model smaller\n"
    assert capsys.readouterr().err == told


def test_any_other_error_of_the_reference_is_ours_and_has_its_traceback(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "run_reference_of", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        cli.main(["validate", "tiny"])


def test_a_launched_rank_with_wrong_input_says_so_and_tells_its_peers(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody comes here, so it does not wait for long."""
    (port,) = free_ports(1)
    for name, value in (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port}).items():
        monkeypatch.setenv(name, value)
    met: list[str] = []
    meet = Presence.meet

    def watched(self: Presence, brought: str, *, timeout: float) -> list[str]:
        met.append(brought)
        return meet(self, brought, timeout=timeout)

    monkeypatch.setattr(Presence, "meet", watched)
    assert cli.main(["validate", "none.toml", "--timeout", "0.3"]) == 2
    assert capsys.readouterr().err.startswith("moe-dispatch: config none.toml does not exist; name a TOML file")
    assert [json.loads(text)["problem"][:20] for text in met] == ["config none.toml doe"]
