"""What the user sees of the attention part of a plan."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Console

from ..desk.console import print_lines
from ..desk.tables import FittingTable
from .attention import AttentionForecast, AttentionRow
from .config import AttentionDims, PlanConfig

NAMES = ("order", "scheme")
COLUMNS = (
    *NAMES, "ms", "work\nms", "forward\nMB", "backward\nMB", "node\nMB", "between\nMB", "collec-\ntives",
    "fullest\n/ mean", "kept\nMB", "most\nMB",
)  # fmt: skip
FIRST_TO_GO = ("collec-\ntives", "kept\nMB", "work\nms", "backward\nMB", "node\nMB", "between\nMB", "most\nMB")


def print_attention(
    console: Console, config: PlanConfig, attention: AttentionDims, forecast: AttentionForecast
) -> None:
    """What is planned, a line for every scheme and order, and which is cheapest for how many ranks."""
    print_lines(console, ["", _header(config, attention)])
    right = [column for column in COLUMNS if column not in NAMES]
    table = FittingTable(*COLUMNS, right=right, first_to_go=FIRST_TO_GO, below="; --json has all")
    for _, rows in groupby(forecast.rows, key=lambda row: row.order):
        for row in rows:
            table.add_row(*_cells(row))
        table.add_section()
    table.print(console)
    print_lines(console, _notes(forecast))


def as_json(forecast: AttentionForecast) -> dict[str, Any]:
    return {
        "schemes": [_numbers(row) for row in forecast.rows],
        "by_ranks": [_numbers(row) for row in forecast.by_ranks],
    }


def _numbers(row: AttentionRow) -> dict[str, Any]:
    cost = asdict(row.cost)
    del cost["scheme"]
    names = {"ranks": row.ranks, "order": row.order, "scheme": row.name}
    return {**names, **cost, "milliseconds": row.cost.milliseconds}


def _cells(row: AttentionRow) -> tuple[str, ...]:
    cost = row.cost
    return (
        row.order,
        row.name,
        f"{cost.milliseconds:.2f}",
        f"{cost.work_ms:.2f}",
        f"{cost.forward_bytes / 1e6:.1f}",
        f"{cost.backward_bytes / 1e6:.1f}",
        f"{cost.intra_bytes / 1e6:.1f}",
        f"{cost.inter_bytes / 1e6:.1f}",
        f"{cost.collectives}",
        f"{cost.balance:.2f}",
        f"{cost.kept_bytes / 1e6:.1f}",
        f"{cost.most_bytes / 1e6:.1f}",
    )


def _header(config: PlanConfig, attention: AttentionDims) -> str:
    window = f", window {attention.window}" if attention.window else ""
    documents = f", {len(attention.documents)} documents" if attention.documents else ""
    return (
        f"Attention: {attention.heads} heads, {attention.kv_heads} of keys and values, of {attention.width} and "
        f"{attention.value_width} x {config.model.dtype}; causal{window}{documents}, {attention.length} tokens over "
        f"{attention.ranks} ranks, {attention.tflop_s:g} TFLOP/s"
    )


def _notes(forecast: AttentionForecast) -> Iterator[str]:
    runs = [
        (name, [row.ranks for row in rows])
        for name, rows in groupby(forecast.by_ranks, key=lambda row: f"{row.name} in {row.order} order")
    ]
    told = (f"{name} for {_range(ranks)} ranks" for name, ranks in runs)
    yield f"Cheapest by the number of ranks: {'; '.join(told)}."


def _range(ranks: list[int]) -> str:
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
