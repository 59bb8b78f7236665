"""What the tools print: tables and lines on standard output, progress on standard error."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .output import is_stdout

WIDTH = 250  # more than the widest table: rich folds cells at 80 columns in a pipe, and narrower on a narrow terminal


def output_console(*, json: Path | None = None) -> Console:
    """Standard output, wide enough for every table; standard error where the file ``json`` is standard output."""
    return Console(width=WIDTH, stderr=is_stdout(json))


def new_table(*columns: str, right: Collection[str] = ()) -> Table:
    """A table in the style of the tools, without rows.

    Args:
        right: the columns that are aligned to the right.
    """
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Each line as it is: neither folded nor read as markup."""
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def print_verdict(console: Console, verdict: str, *, fine: bool) -> None:
    """The last line of a report, after an empty one; green or red on a terminal."""
    console.print()
    console.print(Text(verdict, "bold green" if fine else "bold red"), soft_wrap=True)


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
