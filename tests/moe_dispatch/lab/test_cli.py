"""The command line before any command runs: usage, extras, what it imports."""

import importlib.util
import multiprocessing
import re
import subprocess
import sys
import threading
import tomllib

import pytest
import torch

from moe_dispatch.lab import cli
from tests.support.lab.configs import ROOT
from tests.support.lab.launches import TORCHRUN


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["validate", "--timeout", "0"], "'0' is not a number of seconds above 0, at most 604800 (a week), e.g. 300"),
        (["validate", "--timeout", "soon"], "'soon' is not a number of seconds above 0"),
        (["bench", "--timeout", "1e30"], "'1e30' is not a number of seconds above 0"),
        (["bench", "--repeat", "\u0663"], "is not a whole number above 0"),  # an Arabic 3
        (["bench", "--repeat", "9" * 19], "is not a whole number above 0 of at most 18 digits, e.g. 7"),
        (["plan", "--inter-gb-s", "fast"], "argument --inter-gb-s: 'fast' is not a number above 0, at most 1e+09"),
        (["plan", "--intra-gb-s", "nan"], "argument --intra-gb-s: 'nan' is not a number above 0"),
        (["plan", "--latency-us", "-1"], "argument --latency-us: '-1' is not a number of at least 0"),
        (["plan", "--zipf", "1e308"], "argument --zipf: '1e308' is not a number of at least 0, at most 1e+09"),
        (["validate", "--mutants", "--mutant", "x"], "not allowed with argument"),
    ],
)
def test_wrong_usage_exits_with_status_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gone", "argv", "extra"),
    [("rich", [], "cli"), ("numpy", [], "cli"), ("matplotlib", ["--plot", "out.png"], "plot")],
)
def test_a_missing_extra_is_told_with_the_command_that_installs_it(
    gone: str,
    argv: list[str],
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == gone else importlib.util.find_spec(name))
    assert cli.main(["validate", "tiny", *argv]) == 3
    install = f'pip install "moe-dispatch[{extra}]"'
    message = f"moe-dispatch: {gone} cannot be imported, which this command needs; run: {install}\n"
    assert capsys.readouterr().err == message


def test_type_checkers_of_users_see_our_types() -> None:
    """PEP 561. The wheel has every file of the two packages."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert packages["packages"] == ["moe_dispatch", "sp_attention"]
    assert all((ROOT / package / "py.typed").read_text() == "" for package in packages["packages"])


def test_versions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    found = capsys.readouterr().out
    assert re.fullmatch(rf"moe-dispatch \S.*, torch {re.escape(torch.__version__)}, Python 3\.\d+\.\d+\n", found)


@pytest.mark.parametrize("command", ["validate", "bench", "plan"])
@pytest.mark.parametrize("before", [[], ["no_such_config", "--json", "/none/out.json"]])
def test_help_of_a_command_reads_and_starts_nothing(
    command: str, before: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "_run", lambda _: pytest.fail("the command ran"))
    threads, children = threading.active_count(), set(multiprocessing.active_children())  # ranks of other tests
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, *before, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: moe-dispatch {command} [-h]")
    assert threading.active_count() == threads
    assert set(multiprocessing.active_children()) <= children


def test_parsing_the_command_line_imports_no_extra() -> None:
    code = """
import contextlib, io, sys
from moe_dispatch.lab.cli import main
for command in ("validate", "bench", "plan"):
    for argv in ([command, "--help"], [command, "--no-such-option"]):
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()), \
                contextlib.redirect_stderr(io.StringIO()):
            main(argv)
print({"pydantic", "rich", "matplotlib"} & set(sys.modules))
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout == "set()\n"
