"""The arguments of ``plan``."""

import argparse
from typing import TYPE_CHECKING, Any

from ..desk.options import above_zero, add_config, add_json, count, zero_or_more

if TYPE_CHECKING:
    from .command import Job

DESCRIPTION = (
    "Predict what one MoE layer sends: with a row for each choice, with a row for each rank that a token needs, and "
    "with a row for each node and then for each rank, under uniform and Zipf routing. And what attention of a long "
    "sequence costs in every scheme, where the config has a table [attention]. Nothing is run. "
    "Exit status: 0, 2 for wrong arguments or config, 3 if a file could not be written."
)


def add_plan(commands: Any) -> None:
    """Add the command to ``commands``, the subparsers of argparse."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan", help="predict rows, bytes, time and memory of a layer on a cluster", description=DESCRIPTION
    )
    add_config(parser, metavar="MODEL", default="deepseek_v3", example="mixtral_8x7b")
    parser.add_argument(
        "--nodes",
        metavar="N",
        type=count,
        nargs="+",
        help="number of nodes; several give a table with a part for each",
    )
    parser.add_argument("--ranks-per-node", metavar="R", type=count, help="ranks on each node")
    parser.add_argument(
        "--intra-gb-s", metavar="X", type=above_zero, help="GB/s of a rank to ranks of its node, in each direction"
    )
    parser.add_argument(
        "--inter-gb-s", metavar="Y", type=above_zero, help="GB/s of a rank to other nodes, in each direction"
    )
    parser.add_argument("--latency-us", metavar="US", type=zero_or_more, help="least microseconds of a collective")
    parser.add_argument("--tokens", metavar="T", type=count, help="tokens on each rank")
    parser.add_argument("--length", metavar="L", type=count, help="tokens of a sequence, for attention")
    parser.add_argument("--sequence-ranks", metavar="P", type=count, help="ranks of a sequence, for attention")
    parser.add_argument("--zipf", metavar="S", type=zero_or_more, help="exponent of Zipf's law among experts")
    add_json(parser)
    parser.set_defaults(prepare=_prepare, plot=None)


def _prepare(arguments: argparse.Namespace) -> "Job":
    from .command import prepare  # needs the extra "cli"

    return prepare(arguments)
