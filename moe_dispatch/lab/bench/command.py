"""``bench``: check all input, run, print, write."""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ...testing import RankError, RankPool
from ..desk.console import ProgressDisplay, output_console
from ..desk.exits import COULD_NOT_RUN, DIFFERS, FINE, Stop, tell
from ..desk.names import chosen_names
from ..desk.output import check_output
from ..desk.packaged import find_config
from ..desk.provenance import provenance
from .config import BenchConfig, PlanOfManyConfig, WorkloadConfig, load_bench
from .contenders.named import find_adapter
from .measure import measure
from .memory import ALLOCATOR
from .one_of_many import measure_plans
from .report import Setting, print_bench, write_bench
from .results import WorkloadResult, largest

QUIET = (("KINETO_LOG_LEVEL", "99"),)  # else the profiler prints when it starts and ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run whose input was checked.

    Attributes:
        adapter: ``package.module:Name`` of a class to time too; empty for none.
        repeat: repetitions of each contender.
        profile: whether to measure what each spends its time on.
        timeout: seconds for each workload.
        json, plot: files to write.
        origin: what the JSON says of the run.
    """

    config: BenchConfig
    workloads: Sequence[WorkloadConfig]
    adapter: str
    repeat: int
    profile: bool
    timeout: float
    json: Path | None
    plot: Path | None
    origin: Mapping[str, str]

    def run(self) -> int:
        """The exit status: see ``desk/exits.py``; 0 if every workload ran and every contender was right."""
        setting = Setting(
            torch=torch.__version__,
            cores=os.cpu_count() or 1,
            load_average=os.getloadavg()[0],
            repeat=self.repeat,
        )
        results: list[WorkloadResult] = []
        stop = Stop()
        try:
            with ProgressDisplay(Console(stderr=True), len(self.workloads)) as display:
                for workload in self.workloads:
                    display.started(workload.name)
                    results.append(run_workload(workload, self))
                    display.finished(workload.name, "broke off" if results[-1].error else "done")
        except KeyboardInterrupt as error:  # the workloads that finished are told
            stop = Stop.of(error)
            tell(stop.reason, stop.status)
        status = stop.status or status_of(results)
        if results or not stop.status:
            print_bench(output_console(json=self.json), setting, results)
        if self.json:
            write_bench(self.json, self.config, setting, results, status=status, stop=stop, origin=self.origin)
        if self.plot and not stop.status:
            from .plot import write_plot  # needs the extra "plot"

            write_plot(self.plot, results)
        return status


def status_of(results: Sequence[WorkloadResult]) -> int:
    """The exit status of workloads that ran."""
    if any(line.wrong for result in results for line in result.lines):
        return DIFFERS
    return COULD_NOT_RUN if any(result.error for result in results) else FINE


def prepare(arguments: argparse.Namespace) -> Job:
    """Read and check all input.

    Raises:
        ValueError: fact, rule, remedy.
    """
    config = load_bench(find_config(arguments.config, tool="bench"))
    if arguments.adapter:
        find_adapter(arguments.adapter)
    if arguments.plot:
        from ..desk.plots import check_plot  # needs the extra "plot"

        check_plot(arguments.plot)
    for path in (arguments.json, arguments.plot):
        if path:
            check_output(path)
    chosen = chosen_names(arguments.workloads, [workload.name for workload in config.workloads], what="workload")
    return Job(
        config=config,
        workloads=[workload for workload in config.workloads if workload.name in chosen],
        adapter=arguments.adapter or "",
        repeat=arguments.repeat,
        profile=arguments.profile,
        timeout=arguments.timeout,
        json=arguments.json,
        plot=arguments.plot,
        origin=provenance(arguments.argv),
    )


def run_workload(workload: WorkloadConfig, job: Job) -> WorkloadResult:
    """One workload on fresh ranks, which all have the allocator settings of :data:`ALLOCATOR`. Of a plan of many
    there is one rank."""
    with environment(dict((*ALLOCATOR, *QUIET))), RankPool() as pool:
        try:
            if isinstance(workload, PlanOfManyConfig):
                of_ranks = pool.run(measure_plans, 1, workload, job.repeat, timeout=job.timeout)
            else:
                given = (workload, job.adapter, job.repeat, job.profile)
                of_ranks = pool.run(measure, workload.ranks, *given, timeout=job.timeout)
        except RankError as error:
            return WorkloadResult(name=workload.name, kind=workload.kind, shape=workload.shape, error=str(error))
    return WorkloadResult(
        name=workload.name,
        kind=workload.kind,
        shape=workload.shape,
        allocator=of_ranks[0][1],
        lines=tuple(largest(list(of_name)) for of_name in zip(*(lines for lines, _ in of_ranks), strict=True)),
    )


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """These variables for the processes started in the block; afterwards all is as it was."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
