"""``validate``: check all input, run, print, write."""

import argparse
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..desk.console import ProgressDisplay, output_console, print_lines
from ..desk.exits import FINE, WRONG_INPUT, CouldNotRun, tell
from ..desk.names import choices, chosen_names
from ..desk.output import check_output
from ..desk.packaged import find_config
from ..desk.provenance import provenance, versions
from ..desk.ranks.launch import Launched, Ranks, find_launched, find_ranks
from .config.load import load_config, load_matrix
from .config.tables import HfConfig, MatrixConfig, SubjectConfig
from .hf import rows_of_hf
from .matrix import run_matrix, run_mutants
from .mutants.mutants import MUTANTS
from .rows import Row
from .runs import MatrixRun, MutantsRun
from .shown.report import document_of, print_matrix, print_mutants, print_rows, write_run
from .sources import UserSource, debug_rows, rows_of_user
from .text import Corpus, batches_of_bytes, batches_of_file, default_text

MOST_TELL_SECONDS = 60.0  # that a rank with wrong input waits for its peers to come and hear of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run whose input was checked.

    Attributes:
        name: of the config.
        notes: what the model is, and why rows of the config do not run with it.
        mutant: name of the known bug to run with; empty for none.
        all_mutants: run with each known bug in turn.
        json, plot: files to write.
        origin: what the JSON says of the run.
    """

    name: str
    config: MatrixConfig
    rows: Sequence[Row]
    notes: Sequence[str]
    text: Corpus
    ranks: Ranks
    mutant: str
    all_mutants: bool
    json: Path | None
    plot: Path | None
    origin: Mapping[str, str]

    def run(self) -> int:
        """The exit status: see ``desk/exits.py``; 0 if every row agrees, or every mutant that can show was caught."""
        run = self._run_mutants() if self.all_mutants else self._run_matrix()
        if run.stop.reason:
            tell(run.stop.reason, run.status)
        if self.ranks.is_main and self.json:
            about = {"subject": self.subject, "notes": list(self.notes)}
            write_run(self.json, document_of(self.config, run, text=self.text, about=about, origin=self.origin))
        if self.ranks.is_main and self.plot and isinstance(run, MatrixRun) and not run.stop.reason:
            from .shown.plot import write_plot  # needs the extra "plot"

            write_plot(self.plot, run, about=self._about())
        return run.status

    @property
    def subject(self) -> str:
        return ", ".join(dict.fromkeys(row.source.told for row in self.rows))

    def _about(self) -> str:
        dtypes, date = " and ".join(self.config.dtypes), self.origin["date"][:16].replace("T", " ")
        versions = f"torch {self.origin['torch']}, moe-dispatch {self.origin['moe_dispatch']}"
        return f"{self.name}, {dtypes}, {date} UTC, {versions}"

    def _run_matrix(self) -> MatrixRun:
        steps = len(self.rows) * len(self.config.dtypes)
        with self._display(steps) as display:
            run = run_matrix(self.config, self.rows, self.text, mutant=self.mutant, ranks=self.ranks, watcher=display)
        if self.ranks.is_main and (run.rows or not run.stop.reason):
            console = output_console(json=self.json)
            print_matrix(console, run, notes=self.notes)
            if run.mutant:
                print_lines(console, [_mutant_line(run)])
        return run

    def _run_mutants(self) -> MutantsRun:
        with self._display(None) as display:  # how many rows it takes is not known
            run = run_mutants(self.config, self.rows, self.text, mutants=MUTANTS, ranks=self.ranks, watcher=display)
        if self.ranks.is_main and (run.mutants or not run.stop.reason):
            print_mutants(output_console(json=self.json), run)
        return run

    def _display(self, steps: int | None) -> ProgressDisplay:
        return ProgressDisplay(Console(stderr=True, quiet=not self.ranks.is_main), steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Rows that are printed and not run, by one of the ranks."""

    config: MatrixConfig
    rows: Sequence[Row]
    notes: Sequence[str]
    is_main: bool

    def run(self) -> int:
        """The exit status, 0."""
        if self.is_main:
            print_rows(output_console(), self.config, self.rows, notes=self.notes)
        return FINE


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Wrong input of one of several launched ranks, whose peers would wait for it."""

    problem: str
    launched: Launched
    timeout: float

    def run(self) -> int:
        """Tell the user at once, then the peers; the exit status."""
        tell(self.problem, WRONG_INPUT)
        limit = min(self.timeout, MOST_TELL_SECONDS)
        with suppress(CouldNotRun), self.launched.joined(facts={}, problem=self.problem, timeout=limit):
            pass
        return WRONG_INPUT


def prepare(arguments: argparse.Namespace) -> Job | Listing | Refusal:
    """Read and check all input. Every rank does so before any rank meets another.

    Raises:
        ValueError: fact, rule, remedy.
    """
    launched = find_launched(os.environ)
    try:
        return _job(arguments, launched)
    except ValueError as error:
        if launched:
            return Refusal(problem=str(error), launched=launched, timeout=arguments.timeout)
        raise


def _job(arguments: argparse.Namespace, launched: Launched | None) -> Job | Listing:
    path, config, rows, notes = _config_and_rows(arguments)
    dtypes = chosen_names(arguments.dtypes, config.dtypes, what="dtype")
    config = replace(config, dtypes=tuple(dtype for dtype in config.dtypes if dtype in dtypes))
    rows = _chosen_rows(arguments, rows)
    if arguments.list:
        if arguments.json or arguments.plot:
            raise ValueError("--list runs nothing that could be written; leave out --json and --plot")
        return Listing(config=config, rows=rows, notes=notes, is_main=not (launched and launched.rank))
    text = _text(arguments.text, rows, steps=config.train.steps)
    if arguments.plot:
        from ..desk.plots import check_plot  # needs the extra "plot"

        if arguments.mutants:
            raise ValueError("--plot draws one run of the matrix; leave it out with --mutants, or use --mutant NAME")
        check_plot(arguments.plot)
    for output in filter(None, (arguments.json, arguments.plot)):
        check_output(output)
    facts = _facts(config, rows, text, mutant=arguments.mutant or str(arguments.mutants))
    return Job(
        name=path.stem,
        config=config,
        rows=rows,
        notes=notes,
        text=text,
        ranks=find_ranks(launched, size=config.ranks, facts=facts, timeout=arguments.timeout),
        mutant=arguments.mutant or "",
        all_mutants=arguments.mutants,
        json=arguments.json,
        plot=arguments.plot,
        origin=provenance(arguments.argv),
    )


def _config_and_rows(arguments: argparse.Namespace) -> tuple[Path, MatrixConfig, Sequence[Row], Sequence[str]]:
    """The config's file, what is in it, its rows, and notes on them."""
    if arguments.hf is not None:
        path = find_config(arguments.config, tool="subjects")
        of_hf = load_matrix(path, HfConfig)
        return path, of_hf, *rows_of_hf(of_hf, arguments.hf)
    if arguments.subject is not None:
        path = find_config(arguments.config, tool="subjects")
        of_user = load_matrix(path, SubjectConfig)
        return path, of_user, rows_of_user(of_user, UserSource.of(arguments.subject)), ()
    path = find_config(arguments.config, tool="validate")
    of_debug_model = load_config(path)
    return path, of_debug_model, debug_rows(of_debug_model), ()


def _chosen_rows(arguments: argparse.Namespace, rows: Sequence[Row]) -> Sequence[Row]:
    if arguments.mutant and arguments.mutant not in MUTANTS:
        raise ValueError(
            f"no mutant is named {arguments.mutant!r}; choose from: {choices(arguments.mutant, MUTANTS)}"
        )
    chosen = chosen_names(arguments.rows, [row.name for row in rows], what="row")
    return [row for row in rows if row.name in chosen]


def _text(path: Path | None, rows: Sequence[Row], *, steps: int) -> Corpus:
    shapes = [row.layout.shape for row in rows]
    if path is None:
        return batches_of_bytes(default_text(), shapes, steps=steps, name="Python's help()")
    return batches_of_file(path, shapes, steps=steps)


def _facts(config: MatrixConfig, rows: Sequence[Row], text: Corpus, *, mutant: str) -> dict[str, str]:
    """What all ranks have to mean, by name: versions, the chosen rows, the text, and the config key by key."""
    return {
        **versions(),
        "--rows": ", ".join(row.name for row in rows),
        "subject": ", ".join(dict.fromkeys(row.source.told for row in rows)),
        "--mutant": mutant,
        "text": f"{text.used} bytes used of {text.size}, SHA-256 {text.digest[:16]}",
        **_flat(asdict(config), ""),
    }


def _flat(value: Any, key: str) -> dict[str, str]:
    if isinstance(value, dict):
        return {name: text for k, inner in value.items() for name, text in _flat(inner, f"{key}.{k}").items()}
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return {name: text for i, inner in enumerate(value) for name, text in _flat(inner, f"{key}[{i}]").items()}
    return {key.removeprefix("."): repr(value)}


def _mutant_line(run: MatrixRun) -> str:
    mutant = MUTANTS[run.mutant]
    quantities = list(dict.fromkeys(quantity for row in run.rows for quantity in row.disagreeing))
    found = f"the run fails, as it has to; differing: {', '.join(quantities)}"
    missed = all(row.agrees for row in run.rows)
    return f"mutant {mutant.name} ({mutant.description}): {'MISSED, every row agrees' if missed else found}"
