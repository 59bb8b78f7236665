"""The loops of the main job: every row of the matrix in every dtype, and every mutant in its row."""

import time
import traceback
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

from ...judge.results import Reference
from ...testing import RankError
from ..desk.exits import CouldNotRun, Stop
from ..desk.ranks.launch import Ranks
from .config.tables import MatrixConfig
from .mutants.mutants import Mutant
from .results import RowResult
from .rows import Row
from .run import run_reference_of, run_row
from .runs import MatrixRun, MutantRun, MutantsRun, ReferenceRun, catches
from .text import Corpus


class Watcher(Protocol):
    """What is called as a run goes on, to show its progress."""

    def started(self, what: str) -> None: ...

    def finished(self, what: str, outcome: str) -> None: ...


def run_matrix(
    config: MatrixConfig,
    rows: Sequence[Row],
    text: Corpus,
    *,
    mutant: str,
    ranks: Ranks,
    watcher: Watcher,
) -> MatrixRun:
    """Run ``rows`` in every dtype of the config on ``ranks``, which are started and ended here.

    A row that breaks off on spawned ranks becomes a result with its error; joined ranks cannot go on. Then, and after
    a signal, the rows that finished are returned.
    """
    references: list[ReferenceRun] = []
    results: list[RowResult] = []
    stop = Stop()
    try:
        with ranks:
            for dtype in config.dtypes:
                runner = _RowRunner(config, dtype, text, ranks, watcher, references)
                for row in rows:
                    results.append(runner.run(row, mutant))
    except (CouldNotRun, KeyboardInterrupt) as error:
        stop = Stop.of(error)
    planned = len(config.dtypes) * len(rows)
    return MatrixRun(mutant=mutant, planned=planned, references=tuple(references), rows=tuple(results), stop=stop)


def run_mutants(
    config: MatrixConfig,
    rows: Sequence[Row],
    text: Corpus,
    *,
    mutants: Mapping[str, Mutant],
    ranks: Ranks,
    watcher: Watcher,
) -> MutantsRun:
    """Run each mutant in the rows in which it can show until one catches it, the most kinds of parallelism first.

    In the most exact dtype of the config, where rounding hides least. It ends early as :func:`run_matrix` does.
    """
    runner = _RowRunner(config, max(config.dtypes), text, ranks, watcher, [])  # "float32" < "float64"
    rows = sorted(rows, key=_demand, reverse=True)
    control_of_row: dict[str, RowResult] = {}
    runs: list[MutantRun] = []
    stop = Stop()
    try:
        with ranks:
            for mutant in mutants.values():
                runs.append(_run_mutant(mutant, rows, runner, control_of_row))
    except (CouldNotRun, KeyboardInterrupt) as error:
        stop = Stop.of(error)
    controls = tuple(control_of_row.values())
    return MutantsRun(planned=len(mutants), controls=controls, mutants=tuple(runs), stop=stop)


def _run_mutant(
    mutant: Mutant, rows: Sequence[Row], runner: "_RowRunner", control_of_row: dict[str, RowResult]
) -> MutantRun:
    results: list[RowResult] = []
    for row in filter(mutant.shows_in, rows):
        if row.name not in control_of_row:
            control_of_row[row.name] = runner.run(row, "")
        results.append(runner.run(row, mutant.name))
        if catches(results[-1]):
            break
    return MutantRun(name=mutant.name, description=mutant.description, rows=tuple(results))


def _demand(row: Row) -> tuple[int, int, int]:
    layout = row.layout
    kinds = sum(size > 1 for size in (layout.dp, layout.sp, layout.tp, layout.ep, layout.batch))
    return kinds, layout.ep, layout.batch * layout.seq


class _RowRunner:
    """Runs rows in one dtype; keeps the reference of each kind of data, and notes it in ``references``."""

    def __init__(
        self,
        config: MatrixConfig,
        dtype: str,
        text: Corpus,
        ranks: Ranks,
        watcher: Watcher,
        references: list[ReferenceRun],
    ) -> None:
        self.config, self.dtype, self.text, self.ranks, self.watcher = config, dtype, text, ranks, watcher
        self.references = references
        self._reference_of_data: dict[Hashable, Reference] = {}

    def run(self, row: Row, mutant: str) -> RowResult:
        reference = self._reference(row)
        what = f"{self.dtype}  {row.name}" + (f"  [{mutant}]" if mutant else "")
        self._started(what)
        start = time.perf_counter()
        token_SBL = self.text.token_SBL_of_shape[row.layout.shape]
        try:
            result = self.ranks.run(run_row, self.config, row, self.dtype, token_SBL, reference, mutant)
        except RankError as error:  # only of spawned ranks, which are fresh for the next row
            result = self._broken_off(row, str(error), time.perf_counter() - start)
        verdict = "agree" if result.agrees else f"differ: {', '.join(result.disagreeing)}"
        self.watcher.finished(what, f"{verdict}  {result.seconds:.1f} s")
        return result

    def _reference(self, row: Row) -> Reference:
        if row.data not in self._reference_of_data:
            self._started(f"{self.dtype}  one process, {row.layout.batch} x {row.layout.seq}")
            start = time.perf_counter()
            token_SBL = self.text.token_SBL_of_shape[row.layout.shape]
            try:
                self._reference_of_data[row.data] = run_reference_of(self.config, row, self.dtype, token_SBL)
            except Exception as error:
                if isinstance(error, MemoryError) or "can't allocate memory" in str(
                    error
                ):  # torch has no type for it
                    raise CouldNotRun(
                        f"row {row.name!r} does not fit in memory; make its batch, seq or model smaller"
                    ) from error
                if row.source.is_users:
                    raise CouldNotRun(f"the subject raised in one process\n{traceback.format_exc()}") from error
                raise
            seconds = time.perf_counter() - start
            self._note(row, seconds)
        return self._reference_of_data[row.data]

    def _note(self, row: Row, seconds: float) -> None:
        shape, special = row.layout.shape, row.special
        if any((run.dtype, run.shape, run.special) == (self.dtype, shape, special) for run in self.references):
            special += f", as {row.name}"  # e.g. documents of the same number in other places
        self.references.append(ReferenceRun(dtype=self.dtype, shape=shape, special=special, seconds=seconds))

    def _started(self, what: str) -> None:
        self.watcher.started(what)
        self.ranks.at(what)

    def _broken_off(self, row: Row, error: str, seconds: float) -> RowResult:
        return RowResult(
            name=row.name,
            dtype=self.dtype,
            mesh=row.layout.mesh,
            shape=row.layout.shape,
            differences=(),
            words=(),
            error=error,
            losses=(),
            reference_losses=(),
            seconds=seconds,
            rank_of_token_BL=(),
            rows_sent_PP=(),
            mutant_ran=False,
        )
