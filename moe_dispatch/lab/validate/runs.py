"""What a run of the matrix, or of the mutants, found: its rows, its verdict and its exit status."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..desk.exits import COULD_NOT_RUN, DIFFERS, FINE, Stop
from .results import RowResult

MOST_NAMED = 4  # rows in a verdict, which is to stay a line


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRun:
    """One process, with (B, L) = ``shape``: what rows of the same data and dtype were compared with.

    ``special`` is how the data differ from others of that shape, e.g. "5 documents"; mostly empty.
    """

    dtype: str
    shape: tuple[int, int]
    special: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixRun:
    """What a run of the matrix found; ``mutant`` is the name of the bug that was put in, empty for none.

    ``planned`` is how many rows it has in all dtypes, ``stop`` what ended it before its last row.
    """

    mutant: str
    planned: int
    references: tuple[ReferenceRun, ...]
    rows: tuple[RowResult, ...]
    stop: Stop = field(default_factory=Stop)

    @property
    def agrees(self) -> bool:
        return not self.stop.status and all(row.agrees for row in self.rows)

    @property
    def status(self) -> int:
        """The exit status."""
        return self.stop.status or status_of(self.rows)

    @property
    def verdict(self) -> str:
        """The run in one line: "58 of 58 rows agree", or how many and which do not."""
        broken = [row for row in self.rows if row.error]
        differing = [row for row in self.rows if not row.agrees and not row.error]
        parts = [
            f"{_count(len(rows), self.planned, 'row')} {verb}: {_named(rows)}"
            for rows, verb in ((differing, _verb(len(differing), "differ")), (broken, "could not run"))
            if rows
        ]
        if missing := self.planned - len(self.rows):
            parts.append(f"{_count(missing, self.planned, 'row')} did not run")
        agreeing = sum(row.agrees for row in self.rows)
        agree = _verb(agreeing, "agree")
        parts.append(f"{agreeing} {agree}" if parts else f"{_count(agreeing, self.planned, 'row')} {agree}")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class MutantRun:
    """A mutant and the rows that ran with it. They end with the first row that caught it. There are none where it can
    show in no row of the config. Nor can it show where no rank runs what it replaces."""

    name: str
    description: str
    rows: tuple[RowResult, ...]

    @property
    def could_show(self) -> bool:
        return any(row.mutant_ran or row.error for row in self.rows)

    @property
    def caught(self) -> bool:
        return self.could_show and catches(self.rows[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class MutantsRun:
    """Every mutant, and as controls their rows without one: a row that differs anyway catches nothing.

    ``planned`` is how many mutants there are, ``stop`` what ended the run before the last; then some are missing.
    """

    planned: int
    controls: tuple[RowResult, ...]
    mutants: tuple[MutantRun, ...]
    stop: Stop = field(default_factory=Stop)

    @property
    def all_caught(self) -> bool:
        """Whether every mutant that could show was."""
        showing = [run for run in self.mutants if run.could_show]
        agree = all(row.agrees for row in self.controls) and all(run.caught for run in showing)
        return agree and not self.stop.status

    @property
    def status(self) -> int:
        """The exit status."""
        missed = [run for run in self.mutants if run.could_show and not run.caught]
        if all(row.error for run in missed for row in run.rows):  # a row that broke off catches and misses nothing
            return self.stop.status or status_of((*self.controls, *(row for run in missed for row in run.rows)))
        return self.stop.status or DIFFERS

    @property
    def verdict(self) -> str:
        """The run in one line."""
        caught = sum(run.caught for run in self.mutants)
        hidden = sum(not run.could_show for run in self.mutants)
        parts = [f"{_count(caught, self.planned - hidden, 'mutant')} caught"]
        if hidden:
            parts.append(f"{hidden} could show in none of the rows")
        if missing := self.planned - len(self.mutants):
            parts.append(f"{missing} did not run")
        agreeing = sum(row.agrees for row in self.controls)
        parts.append(f"{_count(agreeing, len(self.controls), 'control')} {_verb(agreeing, 'agree')}")
        return "; ".join(parts)


def status_of(rows: Iterable[RowResult]) -> int:
    """The exit status of rows that all ought to agree."""
    rows = list(rows)
    if any(not row.agrees and not row.error for row in rows):
        return DIFFERS
    return COULD_NOT_RUN if any(row.error for row in rows) else FINE


def catches(row: RowResult) -> bool:
    """Whether a quantity differs. A row that broke off catches nothing: no quantity was compared."""
    return not row.error and not row.agrees


def _count(found: int, of: int, what: str) -> str:
    return f"{found} of {of} {what}{'' if of == 1 else 's'}"


def _verb(count: int, plural: str) -> str:
    return f"{plural}s" if count == 1 else plural


def _named(rows: Sequence[RowResult]) -> str:
    names = [f'"{row.name}" in {row.dtype}' for row in rows[:MOST_NAMED]]
    more = len(rows) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
