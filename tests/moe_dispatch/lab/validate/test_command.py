"""The command: what it runs, what it prints and how it exits; wrong input is told before anything runs."""

import json
import os
from pathlib import Path

import pytest

from moe_dispatch.lab import cli
from moe_dispatch.lab.validate import matrix
from moe_dispatch.lab.validate.mutants.mutants import MUTANTS
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
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    assert cli.main(["validate", "tiny", "--json", str(tmp_path / "out.json")]) == 2
    out, err = capsys.readouterr()
    assert out.count(" agree ") == 6
    assert "was not written (No space left on device)" in err
    assert os.listdir(tmp_path) == []


def test_an_interrupt_ends_without_a_traceback(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(matrix, "run_row", interrupt)
    assert cli.main(["validate", "tiny"]) == 130
    assert capsys.readouterr().err == "moe-dispatch: interrupted\n"
