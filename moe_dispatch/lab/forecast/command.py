"""``plan``, from arguments to exit status."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..desk.files import check_output, find_packaged
from .config import load_plan_config
from .predict import crossing, predict
from .report import print_plan, write_plan

PACKAGE = Path(__file__).parents[2]
CONFIG_FOLDERS = (PACKAGE / "configs" / "plan", PACKAGE.parent / "configs" / "plan")  # of a wheel, of a checkout


def plan(arguments: argparse.Namespace) -> int:
    """0, or 2 for wrong input."""
    try:
        if arguments.json:
            check_output(arguments.json)
        path = find_config(arguments.config)
        configs = [load_plan_config(path, _changes(arguments, nodes)) for nodes in arguments.nodes or [None]]
    except ValueError as error:
        print(f"moe-dispatch: {error}", file=sys.stderr)
        return 2
    predictions = [prediction for each in configs for prediction in predict(each)]
    found = crossing(configs[0])
    print_plan(configs[0], predictions, found)
    try:
        if arguments.json:
            write_plan(arguments.json, configs, predictions, found)
    except OSError as error:  # a full disk: the table is out by now
        if error.filename is None:
            raise
        print(f"moe-dispatch: {error.filename} was not written ({error.strerror})", file=sys.stderr)
        return 2
    return 0


def find_config(name: str) -> Path:
    """See :func:`find_packaged`."""
    packaged = {path.stem: path for folder in reversed(CONFIG_FOLDERS) for path in sorted(folder.glob("*.toml"))}
    return find_packaged(name, packaged, folder=Path("configs/plan"), what="plan")


def _changes(arguments: argparse.Namespace, nodes: int | None) -> dict[str, dict[str, Any]]:
    """What the command line says in place of the file."""
    given = {
        "load": {"tokens_per_rank": arguments.tokens, "zipf": arguments.zipf},
        "cluster": {
            "nodes": nodes,
            "ranks_per_node": arguments.ranks_per_node,
            "intra_gb_s": arguments.intra_gb_s,
            "inter_gb_s": arguments.inter_gb_s,
            "latency_us": arguments.latency_us,
        },
    }
    return {
        table: {key: value for key, value in values.items() if value is not None} for table, values in given.items()
    }
