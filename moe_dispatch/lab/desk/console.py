"""What the tools print: tables and lines on standard output, progress on standard error."""

from collections.abc import Iterable
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from .output import is_stdout

WIDTH = 200  # of what is no terminal: more than the widest table, so that a file or a pipe gets every column


def output_console(*, json: Path | None = None) -> Console:
    """Standard output, or standard error where the file ``json`` is standard output; as wide as its terminal."""
    console = Console(stderr=is_stdout(json))
    if not console.is_terminal:
        console.width = WIDTH
    return console


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Each line as it is, not read as markup; on a terminal it breaks between words."""
    for line in lines:
        console.print(Text(line), soft_wrap=not console.is_terminal)


def print_verdict(console: Console, verdict: str, *, fine: bool) -> None:
    """The last line of a report; green or red on a terminal."""
    console.print(Text(verdict, "bold green" if fine else "bold red"), soft_wrap=not console.is_terminal)


class ProgressDisplay:
    """A line per finished step and, on a terminal, a bar below them. A context manager.

    Args:
        total: the number of steps; None where it is not known.
    """

    def __init__(self, console: Console, total: int | None) -> None:
        columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(
            *columns,
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total)

    def started(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def finished(self, what: str, outcome: str) -> None:
        self._progress.console.print(Text(f"{what}  {outcome}"), soft_wrap=True)
        self._progress.advance(self._task)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
