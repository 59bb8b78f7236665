"""``validate``, from arguments to exit status: all is checked first, then run, then told and written."""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..desk.files import check_output, choices, find_packaged
from ..desk.launch import Ranks, find_ranks
from .config import RowConfig, ValidateConfig, load_config
from .matrix import MatrixRun, run_matrix, run_mutants
from .mutants.mutants import MUTANTS
from .report import ProgressDisplay, output_console, print_matrix, print_mutants, write_json
from .text import check_length, default_text, read_text

PACKAGE = Path(__file__).parents[2]
CONFIG_FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")  # of a wheel, of a checkout


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run whose inputs are all known to work."""

    config: ValidateConfig
    rows: tuple[RowConfig, ...]
    text: bytes
    ranks: Ranks


def validate(arguments: argparse.Namespace) -> int:
    """0: every row agrees, or every mutant that can show in these rows was caught; 1: not; 2: wrong input, told
    before anything ran."""
    try:
        job = prepare(arguments)
    except ValueError as error:
        print(f"moe-dispatch: {error}", file=sys.stderr)
        return 2
    try:
        return _run_mutants(arguments, job) if arguments.mutants else _run_matrix(arguments, job)
    except OSError as error:  # a full disk: the table is out by now
        if error.filename is None:
            raise
        print(f"moe-dispatch: {error.filename} was not written ({error.strerror})", file=sys.stderr)
        return 2


def prepare(arguments: argparse.Namespace) -> Job:
    """Read and check all inputs; every rank does, before any meets another.

    Raises:
        ValueError: fact, rule, remedy.
    """
    config = load_config(find_config(arguments.config))
    rows = _chosen_rows(arguments, config)
    text = read_text(arguments.text) if arguments.text else default_text()
    check_length(text, seq=max(row.seq for row in rows))
    if arguments.plot:
        from .plot import check_plot  # matplotlib is an extra of its own

        if arguments.mutants:
            raise ValueError("--plot draws one run of the matrix; leave it out with --mutants, or use --mutant NAME")
        check_plot(arguments.plot)
    for path in (arguments.json, arguments.plot):
        if path:
            check_output(path)
    ranks = find_ranks(os.environ, size=config.ranks, timeout=arguments.timeout)
    return Job(config=config, rows=rows, text=text, ranks=ranks)


def find_config(name: str, *, of_bench: bool = False) -> Path:
    """The file as given, else the packaged one of that name, of `validate` or of `bench`.

    ``tiny``, ``tiny.toml`` and ``configs/tiny.toml`` name the same packaged one.

    Raises:
        ValueError: there is none.
    """
    files = [path for folder in reversed(CONFIG_FOLDERS) for path in sorted(folder.glob("*.toml"))]
    packaged = {path.stem: path for path in files if path.stem.startswith("bench") == of_bench}
    return find_packaged(name, packaged, folder=Path("configs"), what="config")


def _chosen_rows(arguments: argparse.Namespace, config: ValidateConfig) -> tuple[RowConfig, ...]:
    rows = {row.name: row for row in config.rows}
    if arguments.mutant and arguments.mutant not in MUTANTS:
        raise ValueError(
            f"no mutant is named {arguments.mutant!r}; choose from: {choices(arguments.mutant, MUTANTS)}"
        )
    for name in arguments.rows or ():
        if name not in rows:
            raise ValueError(f"no row of the config is named {name!r}; choose from: {choices(name, rows)}")
    return tuple(row for row in config.rows if row.name in (arguments.rows or rows))


def _run_matrix(arguments: argparse.Namespace, job: Job) -> int:
    total = len(job.rows) * len(job.config.dtypes)
    with job.ranks as ranks, _display(ranks, total) as display:
        run = run_matrix(job.config, job.rows, job.text, mutant=arguments.mutant or "", ranks=ranks, watcher=display)
    if job.ranks.is_main:
        console = output_console()
        print_matrix(console, run)
        if run.mutant:
            console.print(_mutant_line(run), soft_wrap=True, markup=False, highlight=False)
        if arguments.json:
            write_json(arguments.json, job.config, run)
        if arguments.plot:
            from .plot import write_plot

            write_plot(arguments.plot, run.rows)
    return 0 if run.agrees else 1


def _run_mutants(arguments: argparse.Namespace, job: Job) -> int:
    with job.ranks as ranks, _display(ranks, None) as display:  # how many rows it takes is not known
        run = run_mutants(job.config, job.rows, job.text, mutants=MUTANTS, ranks=ranks, watcher=display)
    if job.ranks.is_main:
        print_mutants(output_console(), run)
        if arguments.json:
            write_json(arguments.json, job.config, run)
    return 0 if run.all_caught else 1


def _display(ranks: Ranks, total: int | None) -> ProgressDisplay:
    return ProgressDisplay(Console(stderr=True, quiet=not ranks.is_main), total)


def _mutant_line(run: MatrixRun) -> str:
    mutant = MUTANTS[run.mutant]
    quantities = list(dict.fromkeys(quantity for row in run.rows for quantity in row.disagreeing))
    found = f"the run fails, as it has to; differing: {', '.join(quantities)}"
    return f"mutant {mutant.name} ({mutant.description}): {'MISSED, every row agrees' if run.agrees else found}"
