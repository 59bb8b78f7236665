"""A picture of a run: loss curves, which rank holds which token, where the first MoE layer sent its rows."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator

from ..desk.plots import COLORS, INK, new_figure, save, say_empty
from .results import RowResult

MARKERS = "os^Dv<>P"
FLOOR = 1e-17  # an exact agreement still has a place on a log axis


def write_plot(path: Path, rows: Sequence[RowResult]) -> None:
    """Draw the rows that ran to their end; ``path`` passed :func:`check_plot`."""
    figure = new_figure(width=14, height=9.5, w_pad=0.12, h_pad=0.08)
    finished = [row for row in rows if not row.error]
    if finished:
        curves, layout = figure.subfigures(2, 1, squeeze=False, height_ratios=(5, 3.6))[:, 0]
        _draw_curves(curves, finished)
        tokens, traffic = layout.subplots(1, 2, width_ratios=(2.3, 1))
        row = most_spread(finished)
        _draw_tokens(tokens, row)
        _draw_traffic(traffic, row)
    else:
        say_empty(figure, "no row ran to its end")
    save(figure, path)


def _draw_curves(figure: SubFigure, rows: Sequence[RowResult]) -> None:
    """One column per dtype: the losses above, their relative distance to one process below."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    axes = figure.subplots(2, len(dtypes), squeeze=False, sharex="col", sharey="row", height_ratios=(3, 2))
    styles = dict(zip(dict.fromkeys(row.name for row in rows), cycle(zip(COLORS, MARKERS, strict=True))))
    for (above, below), dtype in zip(axes.T, dtypes, strict=True):
        _frame(above, f"Loss of each step, {dtype}")
        _frame(below, "Distance to one process (1e-17 stands for equal)")
        of_dtype = [row for row in rows if row.dtype == dtype]
        for losses in dict.fromkeys(row.reference_losses for row in of_dtype):
            above.plot(range(len(losses)), losses, color="#CCCCCC", linewidth=7, label="one process", zorder=1)
        for size, row in enumerate(reversed(of_dtype)):  # the first ends on top, the smallest: all stay visible
            color, marker = styles[row.name]
            steps = range(len(row.losses))
            face = {
                "markerfacecolor": "none",
                "markersize": 15 - 9 * size / len(of_dtype),
                "markeredgewidth": 1.6,
            }
            above.plot(steps, row.losses, color=color, marker=marker, linewidth=1, label=row.name, **face)
            distances = [
                max(abs(loss - reference) / abs(reference), FLOOR)
                for loss, reference in zip(row.losses, row.reference_losses, strict=True)
            ]
            below.plot(steps, distances, color=color, marker=marker, markersize=5, linewidth=1)
        below.set_yscale("log")
        below.set_xlabel("step")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        _draw_tolerance(below, of_dtype)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("|difference| / loss")
    drawn = [zip(*above.get_legend_handles_labels(), strict=True) for above in axes[0]]
    entries = {label: handle for pairs in drawn for handle, label in reversed(list(pairs))}  # the first row first
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=4, frameon=False)


def _draw_tolerance(axes: Axes, rows: Sequence[RowResult]) -> None:
    for tolerance in {
        difference.tolerance for row in rows for difference in row.differences if difference.quantity == "loss curve"
    }:
        axes.axhline(tolerance, color=INK, linewidth=1, linestyle="--")
        axes.annotate(
            "tolerance",
            (0, tolerance),
            (4, 3),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            color=INK,
            size="small",
        )


def most_spread(rows: Sequence[RowResult]) -> RowResult:
    """The row that shows most: B > 1, many ranks, tokens cut both ways, every rank sending to every other."""

    def spread(row: RowResult) -> tuple[bool, int, bool, int]:
        ranks_of_each_row = [set(ranks) for ranks in row.rank_of_token_BL]
        ranks = set().union(*ranks_of_each_row)
        cut_both_ways = any(1 < len(ranks_of_row) < len(ranks) for ranks_of_row in ranks_of_each_row)
        links = sum(count > 0 for counts in row.rows_sent_PP for count in counts)
        return row.shape[0] > 1, len(ranks), cut_both_ways, links

    return max(rows, key=spread)


def _draw_tokens(axes: Axes, row: RowResult) -> None:
    rank_BL = np.array(row.rank_of_token_BL)
    ranks = int(rank_BL.max()) + 1
    colors = [COLORS[rank % len(COLORS)] for rank in range(ranks)]
    norm = BoundaryNorm(np.arange(ranks + 1) - 0.5, ranks)
    axes.imshow(rank_BL, cmap=ListedColormap(colors), norm=norm, aspect="auto", interpolation="nearest")
    for border in range(1, len(rank_BL)):
        axes.axhline(border - 0.5, color="white", linewidth=3)
    for rank in range(ranks):
        place_N2 = np.argwhere(rank_BL == rank)
        if len(place_N2):
            (top, left), (bottom, right) = place_N2.min(axis=0), place_N2.max(axis=0)
            label = f"rank {rank}\n{len(place_N2)} tokens"
            box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": "none"}
            axes.text((left + right) / 2, (top + bottom) / 2, label, ha="center", va="center", color=INK, bbox=box)
    axes.set_title(
        f"Which rank holds which token\n{row.name}, B x L = {row.shape[0]} x {row.shape[1]}",
        loc="left",
        color=INK,
    )
    axes.set_xlabel("position in the sequence")
    axes.set_ylabel("row of the batch")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[:].set_visible(False)


def _draw_traffic(axes: Axes, row: RowResult) -> None:
    sent_PP = np.array(row.rows_sent_PP)
    axes.imshow(sent_PP, cmap="Blues", vmin=0, vmax=max(sent_PP.max(), 1))
    for (source, target), count in np.ndenumerate(sent_PP):
        color = "white" if count > 0.6 * sent_PP.max() else INK
        axes.text(target, source, f"{count}", ha="center", va="center", color=color)
    axes.set_title(f"Rows sent, first MoE layer\n{row.name}", loc="left", color=INK)
    axes.set_xlabel("to rank")
    axes.set_ylabel("from rank")
    axes.set_xticks(range(len(sent_PP)))
    axes.set_yticks(range(len(sent_PP)))
    axes.spines[:].set_visible(False)


def _frame(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#EEEEEE")
    axes.set_axisbelow(True)
