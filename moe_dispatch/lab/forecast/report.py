"""A plan as a table, and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..desk.files import replacing
from .config import PlanConfig
from .predict import MOST_RANKS, Crossing, Prediction

WIDTH = 250  # more than the table: rich folds cells at 80 columns in a pipe
COLUMNS = (
    "ranks", "routing", "scheme", "rows sent", "intra B/token", "inter B/token", "plan intra kB", "plan inter kB",
    "ms", "rows mean", "fullest", "payload MB", "rows MB",
)  # fmt: skip


def print_plan(config: PlanConfig, predictions: Sequence[Prediction], crossing: Crossing) -> None:
    """What is planned, a line per number of ranks, routing and scheme, and where counts should go first."""
    console = Console(width=WIDTH)
    model, load, cluster = config.model, config.load, config.cluster
    groups = f", {model.limited_groups} of {model.groups} groups" if model.groups > 1 else ""
    _say(
        console,
        f"{model.top_k} of {model.experts} experts{groups}; {load.tokens_per_rank} tokens of {model.dim} x "
        f"{model.dtype} per rank; {cluster.ranks_per_node} ranks per node, {cluster.intra_gb_s:g} GB/s inside, "
        f"{cluster.inter_gb_s:g} GB/s between nodes, {cluster.latency_us:g} us per collective",
    )
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("routing", "scheme") else "right")
    before = None
    for each in predictions:
        if before and (before.ranks, before.routing) != (each.ranks, each.routing):
            table.add_section()
        table.add_row(*_cells(each))
        before = each
    console.print(table)
    _say(console, crossing_text(crossing))
    if model.limited_groups < model.groups:
        _say(
            console,
            "Uniform routing draws a token's groups at random; Zipf's takes those with the best two scores, of which "
            "more are then needed: more nodes for each token, also at exponent 0.",
        )
    for ranks in dict.fromkeys(each.ranks for each in predictions if each.ranks > model.experts):
        _say(
            console,
            f"{ranks} ranks for {model.experts} experts: {ranks - model.experts} of them hold none. Plan for the "
            f"expert-parallel group, of at most {model.experts} ranks; the others hold copies of it.",
        )


def crossing_text(crossing: Crossing) -> str:
    bytes_from = crossing.ranks_by_bytes or f"more than {MOST_RANKS}"
    time_from = crossing.ranks_by_time or f"more than {MOST_RANKS}"
    return (
        f"Every rank's choices to every rank cost more bytes than counts first from {bytes_from} ranks on, and more "
        f"time, one collective saved, from {time_from} ranks on."
    )


def write_plan(
    path: Path, configs: Sequence[PlanConfig], predictions: Sequence[Prediction], crossing: Crossing
) -> None:
    """The configs, one for each number of nodes, and every number."""
    document = {
        "configs": [asdict(config) for config in configs],  # pyright: ignore[reportArgumentType]
        "predictions": [asdict(each) for each in predictions],
        "counts_first": asdict(crossing),
    }
    with replacing(path) as part:
        part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _cells(each: Prediction) -> tuple[str, ...]:
    return (
        f"{each.nodes} x {each.ranks // each.nodes}",
        each.routing,
        each.scheme,
        f"{each.rows_sent:.0f}",
        f"{each.intra_bytes:.0f}",
        f"{each.inter_bytes:.0f}",
        f"{each.plan_intra_bytes / 1e3:.1f}",
        f"{each.plan_inter_bytes / 1e3:.1f}",
        f"{each.milliseconds:.2f}",
        f"{each.mean_rows:.0f}",
        f"{each.fullest_rows:.0f}",
        f"{each.payload_bytes / 1e6:.1f}",
        f"{each.row_bytes / 1e6:.1f}",
    )


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)
