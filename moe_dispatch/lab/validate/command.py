"""``validate``: check all input, run, print, write."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..desk.console import ProgressDisplay, output_console
from ..desk.launch import Ranks, find_ranks
from ..desk.names import choices, chosen_names
from ..desk.output import check_output
from ..desk.packaged import find_config
from .config.load import load_config
from .config.tables import RowConfig, ValidateConfig
from .matrix import MatrixRun, run_matrix, run_mutants
from .mutants.mutants import MUTANTS
from .report import print_matrix, print_mutants, write_run
from .text import check_length, default_text, read_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run whose input was checked.

    Attributes:
        mutant: name of the known bug to run with; empty for none.
        all_mutants: run with each known bug in turn.
        json, plot: files to write.
    """

    config: ValidateConfig
    rows: Sequence[RowConfig]
    text: bytes
    ranks: Ranks
    mutant: str
    all_mutants: bool
    json: Path | None
    plot: Path | None

    def run(self) -> int:
        """The exit status. 0: every row agrees, or every mutant that can show in these rows was caught; 1: not."""
        return self._run_mutants() if self.all_mutants else self._run_matrix()

    def _run_matrix(self) -> int:
        steps = len(self.rows) * len(self.config.dtypes)
        with self.ranks as ranks, self._display(steps) as display:
            run = run_matrix(self.config, self.rows, self.text, mutant=self.mutant, ranks=ranks, watcher=display)
        if self.ranks.is_main:
            console = output_console()
            print_matrix(console, run)
            if run.mutant:
                console.print(_mutant_line(run), soft_wrap=True, markup=False, highlight=False)
            if self.json:
                write_run(self.json, self.config, run)
            if self.plot:
                from .plot import write_plot  # needs the extra "plot"

                write_plot(self.plot, run.rows)
        return 0 if run.agrees else 1

    def _run_mutants(self) -> int:
        with self.ranks as ranks, self._display(None) as display:  # how many rows it takes is not known
            run = run_mutants(self.config, self.rows, self.text, mutants=MUTANTS, ranks=ranks, watcher=display)
        if self.ranks.is_main:
            print_mutants(output_console(), run)
            if self.json:
                write_run(self.json, self.config, run)
        return 0 if run.all_caught else 1

    def _display(self, steps: int | None) -> ProgressDisplay:
        return ProgressDisplay(Console(stderr=True, quiet=not self.ranks.is_main), steps)


def prepare(arguments: argparse.Namespace) -> Job:
    """Read and check all input. Every rank does so before any rank meets another.

    Raises:
        ValueError: fact, rule, remedy.
    """
    config = load_config(find_config(arguments.config, tool="validate"))
    rows = _chosen_rows(arguments, config)
    text = read_text(arguments.text) if arguments.text else default_text()
    check_length(text, seq=max(row.seq for row in rows))
    if arguments.plot:
        from ..desk.plots import check_plot  # needs the extra "plot"

        if arguments.mutants:
            raise ValueError("--plot draws one run of the matrix; leave it out with --mutants, or use --mutant NAME")
        check_plot(arguments.plot)
    for path in (arguments.json, arguments.plot):
        if path:
            check_output(path)
    return Job(
        config=config,
        rows=rows,
        text=text,
        ranks=find_ranks(os.environ, size=config.ranks, timeout=arguments.timeout),
        mutant=arguments.mutant or "",
        all_mutants=arguments.mutants,
        json=arguments.json,
        plot=arguments.plot,
    )


def _chosen_rows(arguments: argparse.Namespace, config: ValidateConfig) -> Sequence[RowConfig]:
    if arguments.mutant and arguments.mutant not in MUTANTS:
        raise ValueError(
            f"no mutant is named {arguments.mutant!r}; choose from: {choices(arguments.mutant, MUTANTS)}"
        )
    chosen = chosen_names(arguments.rows, [row.name for row in config.rows], what="row")
    return [row for row in config.rows if row.name in chosen]


def _mutant_line(run: MatrixRun) -> str:
    mutant = MUTANTS[run.mutant]
    quantities = list(dict.fromkeys(quantity for row in run.rows for quantity in row.disagreeing))
    found = f"the run fails, as it has to; differing: {', '.join(quantities)}"
    return f"mutant {mutant.name} ({mutant.description}): {'MISSED, every row agrees' if run.agrees else found}"
