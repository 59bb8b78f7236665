"""What the user sees of a bench run: the settings, a table, and the same as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.text import Text

from ..desk.console import print_lines
from ..desk.exits import Stop
from ..desk.output import write_json
from ..desk.provenance import outcome
from ..desk.tables import FittingTable
from .config import BenchConfig
from .results import Line, Traffic, WorkloadResult

NAMES = ("workload", "contender")
NUMBERS = (
    "forward\nms", "x\nfloor", "fwd + bwd\nms", "x\nfloor",
    "wire\nMB", "collectives", "host\nsyncs", "kept\nMB", "peak\nMB",
)  # fmt: skip
FIRST_TO_GO = ("host\nsyncs", "peak\nMB", "collectives", "kept\nMB", "wire\nMB", "forward\nms", "fwd + bwd\nms")
BELOW = "; --json has all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a run was made on. ``load_average``: of one minute, before the first rank started."""

    torch: str
    cores: int
    load_average: float
    repeat: int


def print_bench(console: Console, setting: Setting, results: Sequence[WorkloadResult]) -> None:
    """Settings, the table, then what each workload is and what kept a contender out of it."""
    print_lines(console, _setting_lines(setting, results))
    table = FittingTable(*NAMES, *NUMBERS, right=NUMBERS, first_to_go=FIRST_TO_GO, below=BELOW)
    for result in results:
        for i, line in enumerate(result.lines):
            table.add_row(Text("" if i else result.name), *_cells(result, line))
        table.add_section()
    table.print(console)
    print_lines(console, _notes(results))
    for result in results:
        if any(line.phase_ms for line in result.lines):
            print_lines(console, [f"{result.name}: share of forward + backward on rank 0, while profiled"])
            _phase_table(result).print(console)


def write_bench(
    path: Path,
    config: BenchConfig,
    setting: Setting,
    results: Sequence[WorkloadResult],
    *,
    status: int,
    stop: Stop,
    origin: Mapping[str, str],
) -> None:
    """How the run ended, where it was made, its config and settings, and every number of every repetition."""
    document = {
        "passed": not status,
        **outcome(status, stop.reason),
        **origin,
        **asdict(setting),
        "config": asdict(config),
        "workloads": [asdict(result) for result in results],
    }
    write_json(path, document)


def _setting_lines(setting: Setting, results: Sequence[WorkloadResult]) -> Iterator[str]:
    yield (
        f"torch {setting.torch}, {setting.cores} cores, load average {setting.load_average:.1f} at the start; "
        f"one thread per rank; median (minimum) of {setting.repeat} repetitions, each the slowest rank's"
    )
    for allocator in dict.fromkeys(result.allocator for result in results if not result.error):
        yield f"allocator of every rank: {' '.join(allocator) or 'the default of the system'}"


def _cells(result: WorkloadResult, line: Line) -> Iterator[str | Text]:
    yield Text(line.name)
    if line.absent:
        yield Text("refused" if line.wrong else "-", "bold red" if line.wrong else "")
        return
    forward, both = result.ratios(line)
    yield _times(line.forward_ms)
    yield f"{forward:.1f}"
    yield _times(line.both_ms)
    yield f"{both:.1f}"
    if line.forward and line.backward:
        yield f"{_megabytes(line.forward.wire_bytes)} + {_megabytes(line.backward.wire_bytes)}"
        yield _pair(line.forward, line.backward, "collectives")
        yield _pair(line.forward, line.backward, "host_syncs")
        yield _megabytes(line.kept_bytes)
        yield _megabytes(line.peak_bytes)


def _times(milliseconds: Sequence[float]) -> str:
    return f"{median(milliseconds):.1f} ({min(milliseconds):.1f})"


def _pair(forward: Traffic, backward: Traffic, name: str) -> str:
    return f"{getattr(forward, name)} + {getattr(backward, name)}"


def _megabytes(number: int | None) -> str:
    if number is None:
        return "n/a"
    return f"{number / 1e6:.0f}" if number >= 1e8 else f"{number / 1e6:.3g}"


def _notes(results: Sequence[WorkloadResult]) -> Iterator[str]:
    for result in results:
        yield f"{result.name}: {result.shape}"
        if result.error:
            yield f"  broke off: {result.error}"
        for line in result.lines:
            if line.absent:
                yield f"  {line.name} {'was refused' if line.wrong else 'is absent'}: {line.absent}"


def _phase_table(result: WorkloadResult) -> FittingTable:
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
