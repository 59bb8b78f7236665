"""``bench``, from arguments to exit status: all is checked first, then run, then told and written."""

import argparse
import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console

from ...testing import RankError, RankPool
from ..desk.files import check_output
from ..validate.command import find_config
from ..validate.report import ProgressDisplay, output_console
from .config import BenchConfig, UlyssesConfig, WorkloadConfig, load_bench
from .contenders.contender import find_adapter
from .measure import measure
from .memory import ALLOCATOR
from .report import Setting, print_bench, write_json
from .results import WorkloadResult, largest

QUIET = (("KINETO_LOG_LEVEL", "99"),)  # the profiler tells of its start and its end otherwise


def bench(arguments: argparse.Namespace) -> int:
    """0: every workload ran, every contender was right; 1: not; 2: wrong input, told before anything ran."""
    try:
        config, workloads = prepare(arguments)
    except ValueError as error:
        print(f"moe-dispatch: {error}", file=sys.stderr)
        return 2
    setting = Setting(
        torch=torch.__version__,
        cores=os.cpu_count() or 1,
        load_average=os.getloadavg()[0],
        repeat=arguments.repeat,
    )
    results = []
    with ProgressDisplay(Console(stderr=True), len(workloads)) as display:
        for workload in workloads:
            display.started(workload.name)
            results.append(run_workload(workload, arguments))
            display.finished(workload.name, "broke off" if results[-1].error else "done")
    print_bench(output_console(), setting, results)
    try:
        if arguments.json:
            write_json(arguments.json, config, setting, results)
        if arguments.plot:
            from .plot import write_plot

            write_plot(arguments.plot, results)
    except OSError as error:  # a full disk: the table is out by now
        if error.filename is None:
            raise
        print(f"moe-dispatch: {error.filename} was not written ({error.strerror})", file=sys.stderr)
        return 2
    return 0 if all(result.fine for result in results) else 1


def prepare(arguments: argparse.Namespace) -> tuple[BenchConfig, Sequence[WorkloadConfig]]:
    """Read and check all inputs.

    Raises:
        ValueError: fact, rule, remedy.
    """
    config = load_bench(find_config(arguments.config, of_bench=True))
    if arguments.adapter:
        find_adapter(arguments.adapter)
    if arguments.plot:
        from ..validate.plot import check_plot  # matplotlib is an extra of its own

        check_plot(arguments.plot)
    for path in (arguments.json, arguments.plot):
        if path:
            check_output(path)
    names = [workload.name for workload in config.workloads]
    for name in arguments.workloads or ():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            remedy = f"choose from: {', '.join(map(repr, names))}" + (f" (did you mean {near[0]!r}?)" if near else "")
            raise ValueError(f"no workload of the config is named {name!r}; {remedy}")
    chosen = arguments.workloads or names
    return config, [workload for workload in config.workloads if workload.name in chosen]


def run_workload(workload: WorkloadConfig, arguments: argparse.Namespace) -> WorkloadResult:
    """Fresh ranks, under the allocator settings that every contender gets, for one workload."""
    kind = "ulysses" if isinstance(workload, UlyssesConfig) else "dispatch"
    with environment(dict((*ALLOCATOR, *QUIET))), RankPool() as pool:
        try:
            of_ranks = pool.run(
                measure,
                workload.ranks,
                workload,
                arguments.adapter or "",
                arguments.repeat,
                arguments.profile,
                timeout=arguments.timeout,
            )
        except RankError as error:
            return WorkloadResult(name=workload.name, kind=kind, shape=workload.shape, error=str(error))
    return WorkloadResult(
        name=workload.name,
        kind=kind,
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
