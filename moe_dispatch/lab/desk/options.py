"""Arguments that several commands have, and what their values have to be."""

import argparse
from pathlib import Path


def add_config(parser: argparse.ArgumentParser, *, default: str, example: str, metavar: str = "CONFIG") -> None:
    """The one positional argument: a config by path or name."""
    parser.add_argument(
        "config",
        metavar=metavar,
        nargs="?",
        default=default,
        help=f"a TOML file, or the name of a packaged one, e.g. {example} (default: %(default)s)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every number to this file")


def add_plot(parser: argparse.ArgumentParser, *, shows: str) -> None:
    parser.add_argument("--plot", metavar="FILE", type=Path, help=f"draw {shows} (png, svg, pdf ...)")


def add_timeout(parser: argparse.ArgumentParser, *, limits: str) -> None:
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=seconds, default=300.0, help=f"limit {limits} (default: 300)"
    )


def count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0, e.g. 7")
    return int(text)


def seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0, e.g. 300")
    return found
