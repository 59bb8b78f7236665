"""What the user sees of a run: a table, and the same as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ....judge.layout import CONTIGUOUS, STRIPED, Layout
from ....judge.results import QUANTITIES
from ...desk.console import print_lines, print_verdict
from ...desk.output import write_json
from ...desk.provenance import outcome
from ...desk.tables import FittingTable
from ..config.tables import MatrixConfig
from ..results import RowResult
from ..rows import Row
from ..runs import MatrixRun, MutantsRun
from ..text import Corpus

MESH = "dp sp tp ep"
BELOW = "; --json has all"
MOST_REFERENCES = 12  # lines about one process: where each row has its own, they would double the table
VERDICTS = ("agrees", "disagreeing", "could_show", "caught")


def print_matrix(console: Console, run: MatrixRun, *, notes: Sequence[str]) -> None:
    """The table of a run, a line for each quantity that differs and each row that broke off, notes, and the
    verdict."""
    table = FittingTable(
        *("row", MESH, "B x L", "dtype", *QUANTITIES, "verdict", "s"),
        first_to_go=(
            "s",
            MESH,
            "B x L",
            "loss",
            "loss curve",
            "logits",
            "gradients",
        ),  # the curve starts with the loss
        below=BELOW,
    )
    shown = run.references if len(run.references) <= MOST_REFERENCES else ()
    for reference in shown:
        shape = f"{reference.shape[0]} x {reference.shape[1]}"
        unmeasured = [""] * len(QUANTITIES)
        name = ", ".join(filter(None, ("one process", reference.special)))
        table.add_row(Text(name), "", shape, reference.dtype, *unmeasured, "reference", f"{reference.seconds:.1f}")
    table.add_section()
    for row in run.rows:
        table.add_row(*_cells(row))
    table.print(console)
    print_lines(console, [*_disagreements(run.rows), *notes])
    print_verdict(console, run.verdict, fine=run.agrees)


def print_mutants(console: Console, run: MutantsRun) -> None:
    """The table of all mutants: which quantity caught each, in which row. Then the verdict."""
    table = FittingTable(
        *("mutant", "what it does", "row", "caught by", "verdict"),
        first_to_go=("what it does", "row", "caught by"),
        below=BELOW,
    )
    for row in run.controls:
        table.add_row("(none)", "control: has to agree", Text(row.name), "", _verdict(row))
    table.add_section()
    for mutant in run.mutants:
        if not mutant.could_show:
            table.add_row(Text(mutant.name), Text(mutant.description), "none in which it could show", "", "not run")
            continue
        last = mutant.rows[-1]
        broken = [row for row in mutant.rows if row.error]
        verdict = Text("caught", "green") if mutant.caught else Text("ERROR" if broken else "MISSED", "bold red")
        row, by = (last.name, ", ".join(last.disagreeing)) if mutant.caught else (f"all {len(mutant.rows)}", "")
        table.add_row(Text(mutant.name), Text(mutant.description), Text(row), by, verdict)
    table.print(console)
    broken = [row for mutant in run.mutants if not mutant.caught for row in mutant.rows if row.error]
    print_lines(console, _disagreements([*run.controls, *broken]))
    print_verdict(console, run.verdict, fine=run.all_caught)


def print_rows(console: Console, config: MatrixConfig, rows: Sequence[Row], *, notes: Sequence[str]) -> None:
    """The table of rows that would run: their meshes and data."""
    table = FittingTable("row", MESH, "B x L", "data", first_to_go=("data", "B x L", MESH))
    for row in rows:
        layout = row.layout
        data = ", ".join(filter(None, (row.special, _spread(layout), row.spreading.told)))
        table.add_row(Text(row.name), _mesh(layout.mesh), f"{layout.batch} x {layout.seq}", data)
    table.print(console)
    runs = f"{len(rows)} row{'' if len(rows) == 1 else 's'} in {' and '.join(config.dtypes)}"
    print_lines(console, [*notes, f"{runs}, each on {config.ranks} ranks"])


def document_of(
    config: MatrixConfig,
    run: MatrixRun | MutantsRun,
    *,
    text: Corpus,
    about: Mapping[str, Any],
    origin: Mapping[str, str],
) -> dict[str, Any]:
    """All of a run: how it ended, where it was made, its config and text, and every number of every row.

    Args:
        about: the subject, and notes on it.
    """
    return {
        "passed": run.agrees if isinstance(run, MatrixRun) else run.all_caught,
        **outcome(run.status, run.stop.reason),
        **origin,
        "text": {"name": text.name, "bytes": text.size, "used_bytes": text.used, "sha256_of_used": text.digest},
        **about,
        "config": asdict(config),
        "verdict": run.verdict,
        **{key: _plain(value) for key, value in _fields(run).items() if key != "stop"},
    }


def write_run(path: Path, document: Mapping[str, Any]) -> None:
    """Write what :func:`document_of` gives; a NaN or infinity is null."""
    write_json(path, document)


def _cells(row: RowResult) -> Iterator[str | Text]:
    yield Text(row.name)
    yield _mesh(row.mesh)
    yield f"{row.shape[0]} x {row.shape[1]}"
    yield row.dtype
    by_quantity = {difference.quantity: difference for difference in row.differences}
    for quantity in QUANTITIES:
        if quantity not in by_quantity:
            yield "-"
            continue
        difference = by_quantity[quantity]
        value = f"{difference.value:.1e}" if difference.value else "0"
        yield Text(value) if difference.agrees else Text(f"{value} !", "bold red")
    yield _verdict(row)
    yield f"{row.seconds:.1f}"


def _spread(layout: Layout) -> str:
    """How the sequence lies over "sp", in words; empty where it is balanced."""
    if layout.order == STRIPED:
        return f"stripes of {layout.stripe}"
    if layout.order != CONTIGUOUS:
        return layout.order
    return f"lengths {', '.join(map(str, layout.lengths))}" if layout.lengths else ""


def _mesh(mesh: str) -> str:
    """ "dp 2, sp 1, ..." as the numbers, each under its name in MESH."""
    return " ".join(f"{size:2}" for size in mesh.replace(",", "").split()[1::2])


def _verdict(row: RowResult) -> Text:
    if row.error:
        return Text("ERROR", "bold red")
    if row.agrees:
        return Text("agree", "green")
    return Text("DIFFERS", "bold red")


def _disagreements(rows: Sequence[RowResult]) -> Iterator[str]:
    for row in rows:
        if row.error:
            yield f"{row.name}, {row.dtype}, broke off: {row.error}"
        for difference in row.differences:
            if not difference.agrees:
                yield (
                    f"{row.name}, {row.dtype}: {difference.quantity} off by {difference.value:.1e} "
                    f"(tolerance {difference.tolerance:.0e}), most at {difference.where}"
                )
        for words in row.words:
            yield f"{row.name}, {row.dtype}: {words}"


def _fields(value: Any) -> dict[str, Any]:
    """A result as a dict, with the verdict that its numbers imply."""
    fields = {name: getattr(value, name) for name in type(value).__dataclass_fields__}
    verdicts = {name: getattr(value, name) for name in VERDICTS if hasattr(value, name)}
    return fields | verdicts


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {name: _plain(inner) for name, inner in _fields(value).items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value
