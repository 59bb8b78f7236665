"""What the user sees of a plan: a table, and the same as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ...plan.counts.rule import first_by_counts
from ..desk.console import print_lines
from ..desk.output import write_json
from ..desk.tables import FittingTable
from .config import PlanConfig
from .plan_bytes import PlanBytes
from .predict import Prediction

NAMES = ("routing", "scheme")
COLUMNS = (
    "ranks", *NAMES, "rows\nsent", "intra\nB/token", "inter\nB/token", "plan kB\nintra", "plan kB\ninter", "ms",
    "rows\nmean", "fullest", "payload\nMB", "rows\nMB",
)  # fmt: skip
PLAN_COLUMNS = (
    "ranks", "form", "by ids\nkB", "ms", "by counts\nkB", "counts\nkB", "beside rows\nkB", "ms",
)  # fmt: skip
FIRST_TO_GO = (
    "plan kB\nintra", "plan kB\ninter", "rows\nmean", "rows\nMB", "payload\nMB", "rows\nsent", "fullest",
    "intra\nB/token", "inter\nB/token",
)  # fmt: skip
BELOW = "; --json has all"


def print_plan(
    console: Console, config: PlanConfig, predictions: Sequence[Prediction], of_plans: Sequence[PlanBytes]
) -> None:
    """What is planned, a line for each number of ranks, routing and scheme, then what to know about the numbers."""
    print_lines(console, [_header(config)])
    numbers = [column for column in COLUMNS if column not in NAMES]
    table = FittingTable(*COLUMNS, right=numbers, first_to_go=FIRST_TO_GO, below=BELOW)
    before = None
    for each in predictions:
        if before and (before.ranks, before.routing) != (each.ranks, each.routing):
            table.add_section()
        table.add_row(*_cells(each))
        before = each
    table.print(console)
    print_lines(console, _notes(config, predictions))
    _print_plans(console, of_plans)


def write_plan(
    path: Path,
    configs: Sequence[PlanConfig],
    predictions: Sequence[Prediction],
    of_plans: Sequence[PlanBytes],
    more: Mapping[str, Any],
    *,
    origin: Mapping[str, str],
) -> None:
    """Where it was made, the configs, one for each number of nodes, and every number; ``more``: of other parts."""
    document = {
        **origin,
        "configs": [asdict(config) for config in configs],  # pyright: ignore[reportArgumentType]
        "predictions": [asdict(each) for each in predictions],
        "plans": [{**asdict(each), "by_counts": each.by_counts} for each in of_plans],
        "by_counts_from_ranks": _first_by_counts(configs[0]),
        **more,
    }
    write_json(path, document)


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


def _header(config: PlanConfig) -> str:
    model, load, cluster = config.model, config.load, config.cluster
    groups = f", {model.limited_groups} of {model.groups} groups" if model.groups > 1 else ""
    return (
        f"{model.top_k} of {model.experts} experts{groups}; {load.tokens_per_rank} tokens of {model.dim} x "
        f"{model.dtype} per rank; {cluster.ranks_per_node} ranks per node, {cluster.intra_gb_s:g} GB/s inside, "
        f"{cluster.inter_gb_s:g} GB/s between nodes, {cluster.latency_us:g} us per collective"
    )


def _print_plans(console: Console, of_plans: Sequence[PlanBytes]) -> None:
    """A line for each number of ranks."""
    table = FittingTable(*PLAN_COLUMNS, right=[column for column in PLAN_COLUMNS if column != "form"])
    for each in of_plans:
        table.add_row(
            f"{each.ranks}",
            each.form,
            f"{each.by_ids / 1e3:.1f}",
            f"{each.by_ids_ms:.3f}",
            f"{each.by_counts / 1e3:.1f}",
            f"{each.counts / 1e3:.1f}",
            f"{each.riding / 1e3:.1f}",
            f"{each.by_counts_ms:.3f}",
        )
    table.print(console)


def _notes(config: PlanConfig, predictions: Sequence[Prediction]) -> Iterator[str]:
    model = config.model
    if model.limited_groups < model.groups:
        yield (
            "Uniform routing draws a token's groups at random. Zipf routing takes the groups with the best two "
            "scores; a token then needs more of their experts, and more nodes, also at exponent 0."
        )
    for ranks in dict.fromkeys(each.ranks for each in predictions if each.ranks > model.experts):
        yield (
            f"{ranks} ranks for {model.experts} experts: {ranks - model.experts} of them hold none. Plan for the "
            f"expert-parallel group, of at most {model.experts} ranks; the others hold copies of it."
        )
    yield (
        f"plan_dispatch sends ids to every rank on fewer than {_first_by_counts(config)} ranks; from then on counts, "
        "and ids beside the rows, in as many collectives. What a rank gets for its plan, with uniform routing:"
    )


def _first_by_counts(config: PlanConfig) -> int:
    return first_by_counts(config.model.top_k, config.model.experts)
