"""The arguments of ``bench``."""

import argparse
from typing import TYPE_CHECKING, Any

from ..desk.exits import EXIT_STATUS
from ..desk.options import add_config, add_json, add_plot, add_timeout, count

if TYPE_CHECKING:
    from .command import Job

DESCRIPTION = (
    "Time this library, the usual implementations, torch's context parallel and floors in turns on CPU ranks that "
    "the command starts, and count what each sends, waits for and keeps. "
    + EXIT_STATUS.format(fine="every workload ran and every contender gave right results")
)


def add_bench(commands: Any) -> None:
    """Add the command to ``commands``, the subparsers of argparse."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench", help="time dispatch and attention over ranks against floors and peers", description=DESCRIPTION
    )
    add_config(parser, default="bench", example="bench_tiny")
    parser.add_argument("--workloads", metavar="NAME", nargs="+", help="run only these workloads of the config")
    parser.add_argument(
        "--adapter",
        metavar="PACKAGE.MODULE:NAME",
        help="time this class too; moe_dispatch/lab/bench/contenders/protocol.py says what it needs",
    )
    parser.add_argument(
        "--repeat", metavar="N", type=count, default=7, help="repetitions of each contender (default: %(default)s)"
    )
    add_json(parser)
    add_plot(parser, shows="times as multiples of the floor's")
    parser.add_argument("--profile", action="store_true", help="print what each contender spends its time on")
    add_timeout(parser, limits="for each workload", default=1800.0)
    parser.set_defaults(prepare=_prepare)


def _prepare(arguments: argparse.Namespace) -> "Job":
    from .command import prepare  # needs the extra "cli"

    return prepare(arguments)
