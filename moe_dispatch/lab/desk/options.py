"""Arguments that several commands have, and what their values have to be."""

import argparse
from pathlib import Path

MOST_SECONDS = 604800
MOST_NUMBER = 1e9
DIGITS = 18  # of an int64


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
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        help="write every number to this file; - is standard output, which then has nothing else",
    )


def add_plot(parser: argparse.ArgumentParser, *, shows: str) -> None:
    parser.add_argument("--plot", metavar="FILE", type=Path, help=f"draw {shows} (png, svg, pdf ...)")


def add_timeout(parser: argparse.ArgumentParser, *, limits: str, default: float = 300.0) -> None:
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=seconds, default=default, help=f"limit {limits} (default: {default:.0f})"
    )


def count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < len(text) <= DIGITS and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0 of at most {DIGITS} digits, e.g. 7")
    return int(text)


def seconds(text: str) -> float:
    found = _number(text)
    if not 0 < found <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds above 0, at most {MOST_SECONDS} (a week), e.g. 300"
        )
    return found


def above_zero(text: str) -> float:
    found = _number(text)
    if not 0 < found <= MOST_NUMBER:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, at most {MOST_NUMBER:g}, e.g. 50")
    return found


def zero_or_more(text: str) -> float:
    found = _number(text)
    if not 0 <= found <= MOST_NUMBER:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0, at most {MOST_NUMBER:g}, e.g. 0.5")
    return found


def _number(text: str) -> float:
    """NaN where it is none, which is in no range."""
    try:
        return float(text)
    except ValueError:
        return float("nan")
