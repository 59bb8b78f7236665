"""The loops of the main job: every row of the matrix in every dtype, and every mutant in its row."""

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...testing import RankError
from ..desk.launch import Ranks
from .config.tables import RowConfig, ValidateConfig
from .mutants.mutants import Mutant
from .results import RowResult
from .run import Reference, run_reference, run_row


class Watcher(Protocol):
    """What is called as a run goes on, to show its progress."""

    def started(self, what: str) -> None: ...

    def finished(self, what: str, outcome: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRun:
    """One process, with (B, L) = ``shape``: what rows of that shape and dtype were compared with."""

    dtype: str
    shape: tuple[int, int]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixRun:
    """What a run of the matrix found; ``mutant`` is the name of the bug that was put in, empty for none."""

    mutant: str
    references: tuple[ReferenceRun, ...]
    rows: tuple[RowResult, ...]

    @property
    def agrees(self) -> bool:
        return all(row.agrees for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class MutantRun:
    """A mutant and the rows that ran with it. They end with the first row that caught it. There are none where it can
    show in no row of the config."""

    name: str
    description: str
    rows: tuple[RowResult, ...]

    @property
    def could_show(self) -> bool:
        return bool(self.rows)

    @property
    def caught(self) -> bool:
        return self.could_show and _catches(self.rows[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class MutantsRun:
    """Every mutant, and as controls their rows without one: a row that differs anyway catches nothing."""

    controls: tuple[RowResult, ...]
    mutants: tuple[MutantRun, ...]

    @property
    def all_caught(self) -> bool:
        """Whether every mutant that could show was."""
        showing = [run for run in self.mutants if run.could_show]
        return all(row.agrees for row in self.controls) and all(run.caught for run in showing)


def run_matrix(
    config: ValidateConfig,
    rows: Sequence[RowConfig],
    text: bytes,
    *,
    mutant: str,
    ranks: Ranks,
    watcher: Watcher,
) -> MatrixRun:
    """Run ``rows`` in every dtype of the config.

    A row that breaks off on spawned ranks becomes a result with its error; on joined ranks its exception ends
    the run.
    """
    references: list[ReferenceRun] = []
    results: list[RowResult] = []
    for dtype in config.dtypes:
        runner = _RowRunner(config, dtype, text, ranks, watcher)
        results += [runner.run(row, mutant) for row in rows]
        references += runner.references
    return MatrixRun(mutant=mutant, references=tuple(references), rows=tuple(results))


def run_mutants(
    config: ValidateConfig,
    rows: Sequence[RowConfig],
    text: bytes,
    *,
    mutants: Mapping[str, Mutant],
    ranks: Ranks,
    watcher: Watcher,
) -> MutantsRun:
    """Run each mutant in the rows in which it can show until one catches it, the most kinds of parallelism first.

    In the most exact dtype of the config, where rounding hides least.
    """
    runner = _RowRunner(config, max(config.dtypes), text, ranks, watcher)  # "float32" < "float64"
    rows = sorted(rows, key=_demand, reverse=True)
    control_of_row: dict[str, RowResult] = {}
    runs: list[MutantRun] = []
    for name, mutant in mutants.items():
        results: list[RowResult] = []
        for row in filter(mutant.shows_in, rows):
            if row.name not in control_of_row:
                control_of_row[row.name] = runner.run(row, "")
            results.append(runner.run(row, name))
            if _catches(results[-1]):
                break
        runs.append(MutantRun(name=name, description=mutant.description, rows=tuple(results)))
    return MutantsRun(controls=tuple(control_of_row.values()), mutants=tuple(runs))


def _catches(row: RowResult) -> bool:
    """Whether a quantity differs. A row that broke off catches nothing: no quantity was compared."""
    return not row.error and not row.agrees


def _demand(row: RowConfig) -> tuple[int, int, int]:
    kinds = sum(size > 1 for size in (row.dp, row.sp, row.tp, row.ep, row.batch))
    return kinds, row.ep, row.batch * row.seq


class _RowRunner:
    """Runs rows in one dtype; keeps the reference of each kind of data."""

    def __init__(self, config: ValidateConfig, dtype: str, text: bytes, ranks: Ranks, watcher: Watcher) -> None:
        self.config, self.dtype, self.text, self.ranks, self.watcher = config, dtype, text, ranks, watcher
        self.references: list[ReferenceRun] = []
        self._reference_of_data: dict[Hashable, Reference] = {}

    def run(self, row: RowConfig, mutant: str) -> RowResult:
        reference = self._reference(row)
        what = f"{self.dtype}  {row.name}" + (f"  [{mutant}]" if mutant else "")
        self.watcher.started(what)
        start = time.perf_counter()
        try:
            result = self.ranks.run(run_row, self.config, row, self.dtype, self.text, reference, mutant)
        except RankError as error:  # only of spawned ranks, which are fresh for the next row
            result = self._broken_off(row, str(error), time.perf_counter() - start)
        verdict = "agree" if result.agrees else f"differ: {', '.join(result.disagreeing)}"
        self.watcher.finished(what, f"{verdict}  {result.seconds:.1f} s")
        return result

    def _reference(self, row: RowConfig) -> Reference:
        shape = (row.batch, row.seq)
        if row.data not in self._reference_of_data:
            self.watcher.started(f"{self.dtype}  one process, {row.batch} x {row.seq}")
            start = time.perf_counter()
            self._reference_of_data[row.data] = run_reference(self.config, row, self.dtype, self.text)
            seconds = time.perf_counter() - start
            self.references.append(ReferenceRun(dtype=self.dtype, shape=shape, seconds=seconds))
        return self._reference_of_data[row.data]

    def _broken_off(self, row: RowConfig, error: str, seconds: float) -> RowResult:
        return RowResult(
            name=row.name,
            dtype=self.dtype,
            mesh=row.mesh,
            shape=(row.batch, row.seq),
            differences=(),
            error=error,
            losses=(),
            reference_losses=(),
            seconds=seconds,
            rank_of_token_BL=(),
            rows_sent_PP=(),
        )
