"""What a run tells: the largest of all ranks in a table, and a plot."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_dispatch.lab.bench.plot import contenders_in, style_of, write_plot
from moe_dispatch.lab.bench.report import Setting, print_bench
from moe_dispatch.lab.bench.results import Line, Traffic, WorkloadResult, largest
from moe_dispatch.lab.desk.console import output_console


def test_a_line_is_the_largest_of_all_ranks() -> None:
    def line(forward: tuple[float, ...], moved: int, kept: int) -> Line:
        traffic = Traffic(collectives=3, wire_bytes=moved, all_ranks_bytes=moved, host_syncs=1)
        return Line(name="x", forward_ms=forward, both_ms=forward, forward=traffic, backward=traffic, kept_bytes=kept)

    merged = largest([line((1.0, 5.0), 10, 7), line((2.0, 3.0), 20, 6)])
    assert merged.forward_ms == (2.0, 5.0)
    assert merged.forward == Traffic(collectives=3, wire_bytes=20, all_ranks_bytes=30, host_syncs=1)
    assert (merged.kept_bytes, merged.peak_bytes) == (7, None)


def test_the_table_prints_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    def line(name: str, forward_ms: tuple[float, ...], both_ms: tuple[float, ...], **given: Any) -> Line:
        return Line(name=name, forward_ms=forward_ms, both_ms=both_ms, **given)

    ours = line(
        "ours",
        (5.0, 4.0, 9.0),
        (12.0, 11.0, 20.0),
        forward=Traffic(collectives=3, wire_bytes=23_700_000, all_ranks_bytes=90_000_000, host_syncs=1),
        backward=Traffic(collectives=2, wire_bytes=23_600_000, all_ranks_bytes=90_000_000, host_syncs=0),
        kept_bytes=857_000,
        peak_bytes=143_000_000,
    )
    lines = (ours, line("rank floor", (2.0, 1.0, 3.0), (4.0, 3.0, 5.0)), line("choice floor", (4.0,), (8.0,)))
    result = WorkloadResult(name="w", kind="dispatch", shape="any", allocator=("A=1",), lines=lines)
    setting = Setting(torch="9.9", cores=7, load_average=0.25, repeat=3)
    print_bench(output_console(), setting, [result])
    printed = [" ".join(row.split()) for row in capsys.readouterr().out.splitlines()]
    assert (
        "torch 9.9, 7 cores, load average 0.2 at the start; one thread per rank; median (minimum) of 3 repetitions"
        in (printed[0])
    )
    assert printed[1] == "allocator of every rank: A=1"
    assert "w ours 5.0 (4.0) 2.5 12.0 (11.0) 3.0 23.7 + 23.6 3 + 2 1 + 0 0.857 143" in printed
    assert "rank floor 2.0 (1.0) 1.0 4.0 (3.0) 1.0" in printed
    assert "choice floor 4.0 (4.0) 2.0 8.0 (8.0) 2.0" in printed


def test_attention_has_a_table_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """With the bytes of all ranks, and the rank that computes most."""
    traffic = Traffic(collectives=1, wire_bytes=9_000_000, all_ranks_bytes=25_200_000, host_syncs=0)
    theirs = Line(
        name="torch gather",
        forward_ms=(200.0, 300.0),
        both_ms=(500.0, 600.0),
        processor_ms=((100.0, 100.0), (300.0, 400.0)),
        forward=traffic,
        backward=traffic,
        kept_bytes=65_500,
        peak_bytes=None,
    )
    floor = Line(name="floor", forward_ms=(50.0,), both_ms=(99.0,), processor_ms=((40.0,), (40.0,)))
    absent = Line(name="textbook", absent="needs even shards")
    attention = WorkloadResult(name="w", kind="attention", shape="any", lines=(theirs, absent, floor))
    exchange = WorkloadResult(name="e", kind="ulysses", shape="any", lines=(replace(floor, name="floor"),))
    setting = Setting(torch="9.9", cores=7, load_average=0.25, repeat=2)
    print_bench(output_console(), setting, [attention, exchange])
    printed = [" ".join(row.split()) for row in capsys.readouterr().out.splitlines()]
    assert "w torch gather 250 5.00 550 (500) 5.56 225 1.56 25.2 + 25.2 1 + 1 0.0655 n/a" in printed
    assert "textbook -" in printed
    assert "floor 50.0 1.00 99.0 (99.0) 1.00 40.0 1.00" in printed
    assert "e floor 50.0 (50.0) 1.0 99.0 (99.0) 1.0" in printed
    assert len([row for row in printed if row.startswith("workload contender")]) == 2
    assert printed[-2:] == [" textbook is absent: needs even shards".strip(), "e: any"]


def test_a_plot_without_a_finished_workload_says_so(tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    write_plot(path, [WorkloadResult(name="x", kind="dispatch", shape="", error="it broke")])
    assert "no workload ran to its end" in path.read_text()


def test_a_plot_tells_more_contenders_apart_than_there_are_colours(tmp_path: Path) -> None:
    timed = [Line(name=f"contender {i}", forward_ms=(2.0,), both_ms=(3.0,)) for i in range(13)]
    floor = Line(name="floor", forward_ms=(1.0,), both_ms=(1.0,))
    absent = Line(name="absent", absent="cannot")
    results = [WorkloadResult(name="x", kind="attention", shape="", lines=(*timed, absent, floor))]
    names = contenders_in(results)
    assert names == [line.name for line in timed]
    assert len({style_of(place) for place in range(len(names))}) == 13
    path = tmp_path / "out.svg"
    write_plot(path, results)
    assert all(f"<!-- {name} -->" in path.read_text() for name in (*names, "floor"))
