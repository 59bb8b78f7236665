"""The command line: ``moe-dispatch`` or ``python -m moe_dispatch``.

Parsing needs no extras: what a command imports besides is imported when it runs.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from .bench.arguments import add_bench
from .desk.output import OutputError
from .forecast.arguments import add_plan
from .validate.arguments import add_validate

MODULES_OF_EXTRA = (("cli", ("pydantic", "rich")), ("plot", ("matplotlib",)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. Wrong usage ends in SystemExit(2), as argparse has it."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return _tell("interrupted", 130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-dispatch", description="Exact expert-parallel dispatch for MoE training."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add_command in (add_validate, add_bench, add_plan):
        add_command(commands)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if missing := _missing_extra(arguments):
        return _tell(missing, 2)
    try:
        job = arguments.prepare(arguments)
    except ValueError as error:  # wrong input, found before anything ran
        return _tell(str(error), 2)
    try:
        return job.run()
    except OutputError as error:  # a full disk; the table was printed before
        return _tell(str(error), 2)


def _missing_extra(arguments: argparse.Namespace) -> str:
    """What to install before the command can run; empty where nothing is missing."""
    for extra, modules in MODULES_OF_EXTRA:
        missing = [name for name in modules if find_spec(name) is None]
        if missing and (extra == "cli" or arguments.plot):
            return (
                f"{' and '.join(missing)} cannot be imported, which this command needs; "
                f'run: pip install "moe-dispatch[{extra}]"'
            )
    return ""


def _tell(message: str, status: int) -> int:
    print(f"moe-dispatch: {message}", file=sys.stderr)
    return status
