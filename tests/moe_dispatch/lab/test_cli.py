"""The command line before any command runs: usage, extras, what it imports."""

import importlib.util
import subprocess
import sys

import pytest

from moe_dispatch.lab import cli
from tests.support.lab.configs import ROOT


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
