"""What the user sees of a bench run: the settings, tables, and the same as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from ..desk.console import print_lines
from ..desk.exits import Stop
from ..desk.output import write_json
from ..desk.provenance import outcome
from .config import BenchConfig
from .results import WorkloadResult
from .tables import phase_table, tables_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a run was made on. ``load_average``: of one minute, before the first rank started."""

    torch: str
    cores: int
    load_average: float
    repeat: int


def print_bench(console: Console, setting: Setting, results: Sequence[WorkloadResult]) -> None:
    """Settings, the tables, then what each workload is and what kept a contender out of it."""
    print_lines(console, _setting_lines(setting, results))
    for table in tables_of(results):
        table.print(console)
    print_lines(console, _notes(results))
    for result in results:
        if any(line.phase_ms for line in result.lines):
            print_lines(console, [f"{result.name}: share of forward + backward on rank 0, while profiled"])
            phase_table(result).print(console)


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


def _notes(results: Sequence[WorkloadResult]) -> Iterator[str]:
    for result in results:
        yield f"{result.name}: {result.shape}"
        if result.error:
            yield f"  broke off: {result.error}"
        for line in result.lines:
            if line.absent:
                yield f"  {line.name} {'was refused' if line.wrong else 'is absent'}: {line.absent}"
