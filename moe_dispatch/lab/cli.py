"""The command line: ``moe-dispatch`` or ``python -m moe_dispatch``.

Parsing needs no extras; each command says which it needs.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

MODULES_OF_EXTRA = {"cli": ("pydantic", "rich"), "plot": ("matplotlib",)}
DEFAULT_CONFIG = "deepseek_v3_debug"
DEFAULT_BENCH = "bench"
DEFAULT_PLAN = "deepseek_v3"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. Wrong usage ends in SystemExit(2), as argparse has it."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("moe-dispatch: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-dispatch", description="Exact expert-parallel dispatch for MoE training."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_validate(commands.add_parser("validate", help="compare a model under every parallelism with one process"))
    _add_bench(commands.add_parser("bench", help="time dispatch and attention exchanges against their floors"))
    _add_plan(commands.add_parser("plan", help="predict rows, bytes, time and memory of a layer on a cluster"))
    return parser


def _add_validate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a small DeepSeek-style model on real text under every row of a matrix of data, tensor and "
        "expert parallelism, and compare logits, loss, gradients and the loss curve with one process. Spawns "
        "the ranks itself, or joins those of torchrun or srun. Exit status: 0 every row agrees (--mutants: "
        "every mutant was caught), 1 not, 2 wrong input."
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        default=DEFAULT_CONFIG,
        help="a TOML file, or the name of a packaged one, e.g. tiny (default: %(default)s)",
    )
    parser.add_argument(
        "--text", metavar="FILE", type=Path, help="train on this file (default: Python's own help texts)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every number there")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help="draw losses, token placement and traffic (png, svg, pdf ...)",
    )
    parser.add_argument("--rows", metavar="NAME", nargs="+", help="run only these rows of the config")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=300.0,
        help="limit per row on spawned ranks (default: 300)",
    )
    mutants = parser.add_mutually_exclusive_group()
    mutants.add_argument("--mutant", metavar="NAME", help="put a known bug in: the run has to fail")
    mutants.add_argument("--mutants", action="store_true", help="tell what catches each mutant, and in which row")
    parser.set_defaults(run=_validate)


def _validate(arguments: argparse.Namespace) -> int:
    if not _has_extras(arguments):
        return 2
    from .validate.command import validate  # the extras are there now

    return validate(arguments)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time this library, the usual implementation and the bare collectives in turns on spawned CPU ranks, and "
        "count what each sends, waits for and keeps. Exit status: 0 every workload ran and every contender gave "
        "right results, 1 not, 2 wrong input."
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        default=DEFAULT_BENCH,
        help="a TOML file, or the name of a packaged one, e.g. bench_tiny (default: %(default)s)",
    )
    parser.add_argument("--workloads", metavar="NAME", nargs="+", help="run only these workloads of the config")
    parser.add_argument(
        "--adapter",
        metavar="PACKAGE.MODULE:NAME",
        help="time this class too (see lab/bench/contenders)",
    )
    parser.add_argument(
        "--repeat", metavar="N", type=_count, default=7, help="repetitions of each contender (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every number there")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw times over the floor's (png, svg, pdf ...)")
    parser.add_argument("--profile", action="store_true", help="tell where the time of each contender goes")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=300.0,
        help="limit per workload (default: 300)",
    )
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    if not _has_extras(arguments):
        return 2
    from .bench.command import bench  # the extras are there now

    return bench(arguments)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Predict what one MoE layer moves: one row per choice, one per rank, and one per node and then per rank, "
        "under uniform and Zipf routing. Nothing is run. Exit status: 0, or 2 for wrong input."
    )
    parser.add_argument(
        "config",
        metavar="MODEL",
        nargs="?",
        default=DEFAULT_PLAN,
        help="a TOML file, or the name of a packaged one, e.g. mixtral_8x7b (default: %(default)s)",
    )
    parser.add_argument("--nodes", metavar="N", type=_count, nargs="+", help="nodes; a table of several")
    parser.add_argument("--ranks-per-node", metavar="R", type=_count)
    parser.add_argument("--intra-gb-s", metavar="X", type=float, help="of one rank inside its node, each direction")
    parser.add_argument("--inter-gb-s", metavar="Y", type=float, help="of one rank to other nodes, each direction")
    parser.add_argument("--latency-us", metavar="US", type=float, help="that a collective takes at least")
    parser.add_argument("--tokens", metavar="T", type=_count, help="tokens per rank")
    parser.add_argument("--zipf", metavar="S", type=float, help="exponent of Zipf's law among experts")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every number there")
    parser.set_defaults(run=_plan, plot=None)


def _plan(arguments: argparse.Namespace) -> int:
    if not _has_extras(arguments):
        return 2
    from .forecast.command import plan  # the extras are there now

    return plan(arguments)


def _has_extras(arguments: argparse.Namespace) -> bool:
    """Whether what the command imports is installed; where not, the user is told what to install."""
    for extra in ["cli", "plot"] if arguments.plot else ["cli"]:
        missing = [name for name in MODULES_OF_EXTRA[extra] if find_spec(name) is None]
        if missing:
            print(
                f"moe-dispatch: {' and '.join(missing)} cannot be imported, which this command needs; "
                f'run: pip install "moe-dispatch[{extra}]"',
                file=sys.stderr,
            )
            return False
    return True


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0, e.g. 7")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0, e.g. 300")
    return seconds
