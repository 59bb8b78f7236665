"""The tables of a bench run: exchanges over their floor, attention by its schemes, and where the time goes."""

from collections.abc import Callable, Iterator, Sequence
from statistics import mean, median

from rich.text import Text

from ..desk.tables import FittingTable
from .results import Line, Traffic, WorkloadResult

NAMES = ("workload", "contender")
OF_EXCHANGES = (
    "forward\nms", "x\nfloor", "fwd + bwd\nms", "x\nfloor",
    "wire\nMB", "collectives", "host\nsyncs", "kept\nMB", "peak\nMB",
)  # fmt: skip
OF_ATTENTION = (
    "forward\nms", "x\nfloor", "fwd + bwd\nms", "x\nfloor", "core ms\na rank", "fullest\nrank",
    "sent by all\nMB", "collec-\ntives", "kept\nMB", "peak\nMB",
)  # fmt: skip
OF_PLANS = ("plan\nms", "and rows\nms", "first\nms", "received\nMB")
FIRST_TO_GO = (
    "host\nsyncs", "peak\nMB", "collectives", "collec-\ntives", "kept\nMB", "wire\nMB", "forward\nms",
    "fwd + bwd\nms", "sent by all\nMB", "core ms\na rank",
)  # fmt: skip
BELOW = "; --json has all"
Cells = Callable[[WorkloadResult, Line], Iterator[str]]


def tables_of(results: Sequence[WorkloadResult]) -> Iterator[FittingTable]:
    """One for exchanges, one for attention and one for plans of many ranks, of those that there are."""
    attention = [result for result in results if result.kind == "attention"]
    plans = [result for result in results if result.kind == "plan"]
    exchanges = [result for result in results if result.kind not in ("attention", "plan")]
    if exchanges:
        yield _table(exchanges, OF_EXCHANGES, _cells_of_exchange)
    if attention:
        yield _table(attention, OF_ATTENTION, _cells_of_attention)
    if plans:
        yield _table(plans, OF_PLANS, _cells_of_plan)


def phase_table(result: WorkloadResult) -> FittingTable:
    """Milliseconds and shares of each phase, on rank 0."""
    profiled = [line for line in result.lines if line.phase_ms]
    names = [line.name for line in profiled]
    table = FittingTable("phase", *names, right=names, first_to_go=names[:0:-1], below=BELOW)
    totals = [sum((line.phase_ms or {}).values()) for line in profiled]
    for phase in profiled[0].phase_ms or {}:
        times = [(line.phase_ms or {})[phase] for line in profiled]
        table.add_row(
            phase, *(f"{time:.1f} ms {time / total:4.0%}" for time, total in zip(times, totals, strict=True))
        )
    return table


def _table(results: Sequence[WorkloadResult], numbers: Sequence[str], cells: Cells) -> FittingTable:
    table = FittingTable(*NAMES, *numbers, right=numbers, first_to_go=FIRST_TO_GO, below=BELOW)
    for result in results:
        for i, line in enumerate(result.lines):
            name = Text("" if i else result.name)
            if line.absent:
                absent = Text("refused" if line.wrong else "-", "bold red" if line.wrong else "")
                table.add_row(name, Text(line.name), absent)
            else:
                table.add_row(name, Text(line.name), *cells(result, line))
        table.add_section()
    return table


def _cells_of_exchange(result: WorkloadResult, line: Line) -> Iterator[str]:
    forward, both = result.ratios(line)
    yield f"{median(line.forward_ms):.1f} ({min(line.forward_ms):.1f})"
    yield f"{forward:.1f}"
    yield f"{median(line.both_ms):.1f} ({min(line.both_ms):.1f})"
    yield f"{both:.1f}"
    if line.forward and line.backward:
        yield f"{_megabytes(line.forward.wire_bytes)} + {_megabytes(line.backward.wire_bytes)}"
        yield _pair(line.forward, line.backward, "collectives")
        yield _pair(line.forward, line.backward, "host_syncs")
        yield _megabytes(line.kept_bytes)
        yield _megabytes(line.peak_bytes)


def _cells_of_attention(result: WorkloadResult, line: Line) -> Iterator[str]:
    forward, both = result.ratios(line)
    yield _milliseconds(median(line.forward_ms))
    yield f"{forward:.2f}"
    yield f"{_milliseconds(median(line.both_ms))} ({_milliseconds(min(line.both_ms))})"
    yield f"{both:.2f}"
    yield _milliseconds(mean(line.processor_ms_of_rank))
    yield f"{line.fullest_rank:.2f}"
    if line.forward and line.backward:
        yield f"{_megabytes(line.forward.all_ranks_bytes)} + {_megabytes(line.backward.all_ranks_bytes)}"
        yield _pair(line.forward, line.backward, "collectives")
        yield _megabytes(line.kept_bytes)
        yield _megabytes(line.peak_bytes)


def _cells_of_plan(_: WorkloadResult, line: Line) -> Iterator[str]:
    for times in (line.forward_ms, line.both_ms, *line.processor_ms):
        yield f"{_milliseconds(median(times))} ({_milliseconds(min(times))})"
    if line.forward:
        yield _megabytes(line.forward.wire_bytes)


def _milliseconds(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}"


def _pair(forward: Traffic, backward: Traffic, name: str) -> str:
    return f"{getattr(forward, name)} + {getattr(backward, name)}"


def _megabytes(number: int | None) -> str:
    if number is None:
        return "n/a"
    return f"{number / 1e6:.0f}" if number >= 1e8 else f"{number / 1e6:.3g}"
