"""The arguments of ``validate``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..desk.exits import EXIT_STATUS
from ..desk.options import add_json, add_plot, add_timeout
from . import EVERY_TYPE

if TYPE_CHECKING:
    from .command import Job, Listing, Refusal

DEFAULT, DEFAULT_OF_SUBJECTS, DEFAULT_OF_HF = "deepseek_v3_debug", "matrix", "transformers"
DEFAULT_OF_EVERY_TYPE = "every_type"
DESCRIPTION = (
    "Train a small DeepSeek-style model, or yours, on real text under every row of a matrix of data, sequence, "
    "tensor and expert parallelism, and compare logits, loss, gradients and the loss curve with one process. The "
    "command starts its own ranks, or joins those of torchrun or srun. "
    + EXIT_STATUS.format(fine="every row agrees (with --mutants: every mutant was caught)")
)


def add_validate(commands: Any) -> None:
    """Add the command to ``commands``, the subparsers of argparse."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "validate", help="compare a model under every parallelism with one process", description=DESCRIPTION
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        default="",
        help=f"a TOML file, or the name of a packaged one, e.g. tiny (default: {DEFAULT}; with --subject: "
        f"{DEFAULT_OF_SUBJECTS}; with --hf: {DEFAULT_OF_HF})",
    )
    subjects = parser.add_mutually_exclusive_group()
    subjects.add_argument(
        "--subject",
        metavar="FILE.py:NAME",
        help="judge this model instead of the small DeepSeek-style one: a class or object of a file, or of a package "
        "(PACKAGE.MODULE:NAME); docs/subjects.md says what it needs",
    )
    subjects.add_argument(
        "--hf",
        metavar="NAME_OR_JSON_OR_FOLDER",
        help="judge a causal MoE model of Transformers: a model type, e.g. qwen3_moe, or a config.json, both shrunk "
        f"to a debug size; a folder with weights, as it is; or {EVERY_TYPE}, all model types that there are",
    )
    parser.add_argument(
        "--text", metavar="FILE", type=Path, help="train on this file (default: Python's own help texts)"
    )
    add_json(parser)
    add_plot(
        parser, shows="how far each quantity of each row is from its limit, the rank of each token, and rows sent"
    )
    parser.add_argument("--rows", metavar="NAME", nargs="+", help="run only these rows of the config")
    parser.add_argument("--dtypes", metavar="NAME", nargs="+", help="run only in these dtypes of the config")
    add_timeout(parser, limits="for each row, and for ranks of a launcher to meet")
    mutants = parser.add_mutually_exclusive_group()
    mutants.add_argument("--list", action="store_true", help="print the rows and their layouts, and run nothing")
    mutants.add_argument("--mutant", metavar="NAME", help="run with this known bug; the run has to fail")
    mutants.add_argument(
        "--mutants", action="store_true", help="run with each known bug, and print what catches it in which row"
    )
    parser.set_defaults(prepare=_prepare)


def _prepare(arguments: argparse.Namespace) -> "Job | Listing | Refusal":
    from .command import prepare  # needs the extra "cli"

    if not arguments.config:
        of_hf = DEFAULT_OF_EVERY_TYPE if arguments.hf == EVERY_TYPE else DEFAULT_OF_HF
        arguments.config = of_hf if arguments.hf else DEFAULT_OF_SUBJECTS if arguments.subject else DEFAULT
    return prepare(arguments)
