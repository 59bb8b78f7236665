"""README and pages show tables as they are printed: what a line says, printed again, is that line."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from moe_dispatch.judge.results import QUANTITIES, Difference
from moe_dispatch.lab.bench.contenders.named import contenders_of
from moe_dispatch.lab.bench.report import Setting, print_bench
from moe_dispatch.lab.bench.results import Line, Traffic, WorkloadResult
from moe_dispatch.lab.desk.console import WIDTH
from moe_dispatch.lab.validate.mutants.mutants import MUTANTS
from moe_dispatch.lab.validate.results import RowResult
from moe_dispatch.lab.validate.runs import MatrixRun, MutantRun, MutantsRun, ReferenceRun
from moe_dispatch.lab.validate.shown.report import print_matrix, print_mutants
from tests.support.lab.configs import ROOT
from tests.support.lab.made_up_results import AGREEING, differing

README, VALIDATE, BENCH = ROOT / "README.md", ROOT / "docs/validate.md", ROOT / "docs/bench.md"
ONE = ReferenceRun(dtype="float64", shape=(3, 129), special="", seconds=5.0)
ROW = re.compile(
    r"(?P<name>\S.*?) +(?P<mesh>\d +\d +\d +\d) +(?P<B>\d) x (?P<L>\d+) +(?P<dtype>float\d\d) +"
    r"(?P<values>\S+ +\S+ +\S+ +\S+) +agree +(?P<seconds>\d+\.\d)"
)


def lines_of(page: Path) -> list[str]:
    return [line.rstrip() for line in page.read_text().splitlines()]


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def row_of(match: re.Match[str]) -> RowResult:
    values = map(float, match["values"].split())
    return RowResult(
        name=match["name"],
        dtype=match["dtype"],
        mesh="dp {}, sp {}, tp {}, ep {}".format(*match["mesh"].split()),
        shape=(int(match["B"]), int(match["L"])),
        differences=tuple(
            Difference(quantity=quantity, value=value, tolerance=1e-12, where="")
            for quantity, value in zip(QUANTITIES, values, strict=True)
        ),
        words=(),
        error="",
        losses=(),
        reference_losses=(),
        seconds=float(match["seconds"]),
        rank_of_token_BL=(),
        rows_sent_PP=(),
        mutant_ran=False,
    )


@pytest.mark.parametrize(("page", "least"), [(README, 2), (VALIDATE, 41)], ids=lambda value: str(value)[-11:])
def test_pages_show_the_table_of_validate(page: Path, least: int) -> None:
    shown = lines_of(page)
    matches = [match for line in shown if (match := ROW.fullmatch(line))]
    assert len(matches) == least
    console = Console(file=io.StringIO(), width=WIDTH)
    whole = [match for line in lines_of(VALIDATE) if (match := ROW.fullmatch(line))]
    print_matrix(
        console, MatrixRun(mutant="", planned=41, references=(ONE,), rows=tuple(map(row_of, whole))), notes=()
    )
    table = [line for line in printed(console) if line]
    assert table[-1] == "41 of 41 rows agree"
    assert {match[0] for match in matches} <= set(table)
    assert table[0] in shown
    assert any(line.endswith("rows agree") for line in shown)


def mutants_shown() -> list[MutantRun]:
    """Those of docs/validate.md."""
    runs = []
    for line in lines_of(VALIDATE):
        name, *cells = re.split(r" {2,}", line)
        if name in MUTANTS and len(cells) == 4:
            row = differing(AGREEING, "", 0.0)
            for quantity in cells[2].split(", "):
                row = differing(row, quantity, 0.5)
            found = replace(row, name=cells[1])
            runs.append(MutantRun(name=name, description=MUTANTS[name].description, rows=(found,)))
    return runs


def test_pages_show_the_table_of_mutants() -> None:
    runs = mutants_shown()
    assert [run.name for run in runs] == list(MUTANTS)
    console = Console(file=io.StringIO(), width=WIDTH)
    print_mutants(console, MutantsRun(planned=len(runs), controls=(), mutants=tuple(runs)))
    table = printed(console)
    shown = lines_of(VALIDATE)
    for run in runs:
        (line,) = [line for line in table if line.startswith(f"{run.name} ")]
        assert line in shown
        assert f"{run.name} " not in README.read_text() or line in lines_of(README)
    head = next(line for line in table if line.startswith("mutant "))
    assert head in shown
    assert any(line.startswith(f"{len(MUTANTS)} of {len(MUTANTS)} mutants caught; ") for line in shown)


NUMBERS = re.compile(
    r"(?P<workload>[a-e]|) +(?P<name>ours|experts weigh|textbook|(rank |planned |choice |)floor) +"
    r"(?P<f>[\d.]+) \((?P<f_least>[\d.]+)\) +[\d.]+ +(?P<b>[\d.]+) \((?P<b_least>[\d.]+)\) +[\d.]+"
    r"( +(?P<wire>[\d.]+ \+ [\d.]+) +(?P<calls>\d \+ \d) +(?P<syncs>\d \+ \d) +(?P<kept>[\d.]+) +(?P<peak>[\d.]+))?"
)


def line_of(match: re.Match[str]) -> Line:
    forward, forward_least, both, both_least = (float(match[key]) for key in ("f", "f_least", "b", "b_least"))
    line = Line(name=match["name"], forward_ms=(forward_least, forward, forward), both_ms=(both_least, both, both))
    if not match["wire"]:
        return line
    wire, calls, syncs = (match[key].split(" + ") for key in ("wire", "calls", "syncs"))
    traffic = [
        Traffic(collectives=int(call), wire_bytes=round(float(moved) * 1e6), all_ranks_bytes=0, host_syncs=int(sync))
        for moved, call, sync in zip(wire, calls, syncs, strict=True)
    ]
    kept, peak = (round(float(match[key]) * 1e6) for key in ("kept", "peak"))
    return replace(line, forward=traffic[0], backward=traffic[1], kept_bytes=kept, peak_bytes=peak)


def test_pages_show_the_table_of_bench() -> None:
    """But for ratios, whose last digit is that of times with more digits."""
    shown = lines_of(BENCH)
    workloads: list[tuple[str, list[Line]]] = []
    for match in filter(None, map(NUMBERS.fullmatch, shown)):
        if match["workload"]:
            workloads.append((match["workload"], []))
        workloads[-1][1].append(line_of(match))
    assert [name for name, _ in workloads] == list("abcde")
    results = [WorkloadResult(name=name, kind="", shape="", lines=tuple(lines)) for name, lines in workloads]
    console = Console(file=io.StringIO(), width=WIDTH)
    print_bench(console, Setting(torch="", cores=2, load_average=0.0, repeat=9), results)
    table = [line for line in printed(console) if line.startswith(("workload", " ")) or NUMBERS.fullmatch(line)]
    assert len(table) == 2 + sum(len(lines) for _, lines in workloads)

    def without_ratios(lines: list[str]) -> list[str]:
        return [re.sub(r"(?<=\)) +[\d.]+", lambda ratio: "~" * len(ratio[0]), line) for line in lines]

    assert set(without_ratios(table)) <= set(without_ratios(shown))
    in_readme = [line for line in lines_of(README) if NUMBERS.fullmatch(line)]
    assert len(in_readme) == 3
    assert set(in_readme) <= set(shown)


ATTENTION = re.compile(
    r"(?P<workload>4096|8192|window|) +(?P<name>(torch |)(Ulysses|gather|ring|2-D)( zigzag|)|textbook|floor) +"
    r"(-|(?P<f>[\d.]+) +[\d.]+ +(?P<b>[\d.]+) \((?P<b_least>[\d.]+)\) +[\d.]+ +(?P<core>[\d.]+) +(?P<fullest>[\d.]+)"
    r"( +(?P<sent>[\d.]+ \+ [\d.]+) +(?P<calls>\d \+ \d) +(?P<kept>[\d.]+) +(?P<peak>[\d.]+))?)"
)


def line_of_attention(match: re.Match[str]) -> Line:
    if not match["f"]:
        return Line(name=match["name"], absent="cannot")
    forward, both, least, core, fullest = (float(match[key]) for key in ("f", "b", "b_least", "core", "fullest"))
    line = Line(
        name=match["name"],
        forward_ms=(forward,),
        both_ms=(least, both, both),
        processor_ms=((core * fullest,), (core * (2 - fullest),)),  # of two ranks
    )
    if not match["sent"]:
        return line
    sent, calls = (match[key].split(" + ") for key in ("sent", "calls"))
    traffic = [
        Traffic(collectives=int(call), wire_bytes=0, all_ranks_bytes=round(float(moved) * 1e6), host_syncs=0)
        for moved, call in zip(sent, calls, strict=True)
    ]
    kept, peak = (round(float(match[key]) * 1e6) for key in ("kept", "peak"))
    return replace(line, forward=traffic[0], backward=traffic[1], kept_bytes=kept, peak_bytes=peak)


def test_pages_show_the_table_of_attention() -> None:
    """All contenders of each workload of the packaged config; but for ratios of times, as above."""
    shown = lines_of(BENCH)
    workloads: list[tuple[str, list[Line]]] = []
    for match in filter(None, map(ATTENTION.fullmatch, shown)):
        if match["workload"]:
            workloads.append((match["workload"], []))
        if workloads:  # the table of exchanges has a textbook and floors, too
            workloads[-1][1].append(line_of_attention(match))
    assert [name for name, _ in workloads] == ["4096", "8192", "window"]
    for _, lines in workloads:
        assert [line.name for line in lines] == [*contenders_of("attention", ""), "floor"]
    results = [WorkloadResult(name=name, kind="attention", shape="", lines=tuple(lines)) for name, lines in workloads]
    console = Console(file=io.StringIO(), width=WIDTH)
    print_bench(console, Setting(torch="", cores=2, load_average=0.0, repeat=5), results)
    table = [line for line in printed(console) if line.startswith("workload") or ATTENTION.fullmatch(line)]
    assert len(table) == 1 + sum(len(lines) for _, lines in workloads)

    def without_ratios(line: str) -> str:
        """The second and the fourth number."""
        return re.sub(
            r"([\d.]+ +)([\d.]+)( +[\d.]+ \([\d.]+\) +)([\d.]+)",
            lambda m: f"{m[1]}{'~' * len(m[2])}{m[3]}{'~' * len(m[4])}",
            line,
        )

    assert set(map(without_ratios, table)) <= set(map(without_ratios, shown))
