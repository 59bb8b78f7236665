"""The command line: ``moe-dispatch`` or ``python -m moe_dispatch``.

Parsing needs no extras: what a command imports besides is imported when it runs.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec

from .bench.arguments import add_bench
from .desk.exits import COULD_NOT_RUN, WRONG_INPUT, CouldNotRun, Stop, end, interruptible, tell
from .desk.provenance import versions
from .forecast.arguments import add_plan
from .validate.arguments import add_validate

# What needs it: the option of a command, "" for each command.
MODULES_OF_EXTRA = (
    ("cli", "", ("numpy", "pydantic", "rich")),
    ("plot", "plot", ("matplotlib",)),
    ("hf", "hf", ("transformers",)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status (``desk/exits.py``). Wrong usage ends in SystemExit(2), as argparse has it."""
    arguments = _parser().parse_args(argv)
    arguments.argv = tuple(sys.argv[1:] if argv is None else argv)
    return end(_run_to_its_end(arguments))


def _run_to_its_end(arguments: argparse.Namespace) -> int:
    try:
        with interruptible():
            status = _run(arguments)
            sys.stdout.flush()  # here, where a full disk can still be told
            return status
    except KeyboardInterrupt as error:
        stop = Stop.of(error)
        return tell(stop.reason, stop.status)
    except OSError as error:
        return _without_stdout(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-dispatch", description="Exact expert-parallel dispatch for MoE training."
    )
    told = "moe-dispatch {moe_dispatch}, torch {torch}, Python {python}".format_map(versions())
    parser.add_argument("--version", action="version", version=told, help="print versions, and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add_command in (add_validate, add_bench, add_plan):
        add_command(commands)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if missing := _missing_extra(arguments):
        return tell(missing, COULD_NOT_RUN)
    try:
        job = arguments.prepare(arguments)
    except ValueError as error:  # wrong input, found before anything ran
        return tell(str(error), WRONG_INPUT)
    try:
        return job.run()
    except CouldNotRun as error:  # e.g. a full disk; the table was printed before
        return tell(str(error), COULD_NOT_RUN)


def _without_stdout(error: OSError) -> int:
    """Standard output cannot be written, or something else of the system failed."""
    with suppress(OSError, ValueError):  # Python flushes once more at its exit, and would fail there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return tell(f"{error.filename or 'the output'}: {error.strerror or error}", COULD_NOT_RUN)


def _missing_extra(arguments: argparse.Namespace) -> str:
    """What to install before the command can run; empty where nothing is missing."""
    for extra, option, modules in MODULES_OF_EXTRA:
        missing = [name for name in modules if find_spec(name) is None]
        if missing and (not option or getattr(arguments, option, None)):
            return (
                f"{' and '.join(missing)} cannot be imported, which this command needs; "
                f'run: pip install "moe-dispatch[{extra}]"'
            )
    return ""
