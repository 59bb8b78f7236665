"""What is printed is as wide as the terminal; without one, progress is plain."""

import fcntl
import io
import os
import pty
import subprocess
import sys
import termios
from struct import pack

import pytest
from rich.console import Console

from moe_dispatch.lab.desk.console import WIDTH, ProgressDisplay, output_console, print_lines
from tests.support.lab.configs import ROOT


def test_progress_is_one_plain_line_per_row_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO(), width=20)
    with ProgressDisplay(console, 2) as display:
        display.started("float64  a row with a name [red]")
        display.finished("float64  a row with a name [red]", "agree  1.0 s")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "float64  a row with a name [red]  agree  1.0 s\n"


def test_without_a_terminal_the_width_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert output_console().width == WIDTH


@pytest.mark.parametrize(("terminal", "lines"), [(True, ["one two", "three"]), (False, ["one two three"])])
def test_lines_break_between_words_on_a_terminal_only(terminal: bool, lines: list[str]) -> None:
    console = Console(file=io.StringIO(), width=10, force_terminal=terminal)
    print_lines(console, ["one two three"])
    assert isinstance(console.file, io.StringIO)
    assert [line.rstrip() for line in console.file.getvalue().splitlines()] == lines


def on_terminal(columns: int, *argv: str) -> list[str]:
    """What a command prints on a terminal without colours of so many columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = subprocess.Popen(
        [sys.executable, "-m", "moe_dispatch", *argv],
        cwd=ROOT,
        env=environment | {"TERM": "dumb"},
        stdin=its,
        stdout=its,
        stderr=subprocess.DEVNULL,
    )
    os.close(its)
    found = b""
    try:
        while part := os.read(ours, 4096):
            found += part
    except OSError:  # so Linux says that nobody writes any more
        pass
    os.close(ours)
    assert command.wait(60) == 0
    return found.decode().splitlines()


def test_a_table_fits_the_terminal() -> None:
    lines = on_terminal(80, "plan", "deepseek_v3")
    assert max(map(len, lines)) <= 80
    assert "5 of 13 columns left out; --json has all" in [line.rstrip() for line in lines]
    assert sum(line.startswith("8 x 8  uniform   row per ") for line in lines) == 3
