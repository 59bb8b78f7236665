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
    for extra in ["cli", "plot"] if arguments.plot else ["cli"]:
        missing = [name for name in MODULES_OF_EXTRA[extra] if find_spec(name) is None]
        if missing:
            print(
                f"moe-dispatch: {' and '.join(missing)} cannot be imported, which this command needs; "
                f'run: pip install "moe-dispatch[{extra}]"',
                file=sys.stderr,
            )
            return 2
    from .validation.command import validate  # the extras are there now

    return validate(arguments)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0, e.g. 300")
    return seconds
