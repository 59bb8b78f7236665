"""Part of the picture of a run: which rank holds which token, and where the first MoE layer sent its rows."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator

from ...desk.plots import COLORS, INK
from ..results import RowResult


def draw_placement(figure: SubFigure, rows: Sequence[RowResult]) -> None:
    """Of the row that shows most; ``rows`` ran to their end."""
    tokens, traffic = figure.subplots(1, 2, width_ratios=(2.3, 1))
    row = most_spread(rows)
    _draw_tokens(tokens, row)
    _draw_traffic(traffic, row)


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
            top, bottom = place_N2[:, 0].min(), place_N2[:, 0].max()
            left, right = labelled(place_N2[place_N2[:, 0] == top, 1], rank, ranks)
            label = f"rank {rank}\n{len(place_N2)} token{'' if len(place_N2) == 1 else 's'}"
            box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": "none"}
            axes.text((left + right) / 2, (top + bottom) / 2, label, ha="center", va="center", color=INK, bbox=box)
    axes.set_title(
        f"Which rank holds which token\n{row.name}, B x L = {row.shape[0]} x {row.shape[1]}",
        loc="left",
        color=INK,
        parse_math=False,
    )
    axes.set_xlabel("position in the sequence")
    axes.set_ylabel("row of the batch")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[:].set_visible(False)


def labelled(place_N: np.ndarray, rank: int, ranks: int) -> tuple[int, int]:
    """The first and last place of the run of a row that has the label: one of the longest. In an order of tokens
    ranks have several; later ones for later ranks, so that labels do not lie on each other."""
    runs = np.split(place_N, np.flatnonzero(np.diff(place_N) > 1) + 1)
    longest = [run for run in runs if len(run) == max(map(len, runs))]
    run = longest[rank * len(longest) // ranks]
    return int(run[0]), int(run[-1])


def _draw_traffic(axes: Axes, row: RowResult) -> None:
    sent_PP = np.array(row.rows_sent_PP)
    axes.imshow(sent_PP, cmap="Blues", vmin=0, vmax=max(sent_PP.max(), 1))
    for (source, target), count in np.ndenumerate(sent_PP):
        color = "white" if count > 0.6 * sent_PP.max() else INK
        axes.text(target, source, f"{count}", ha="center", va="center", color=color)
    axes.set_title(f"Rows sent, first MoE layer\n{row.name}", loc="left", color=INK, parse_math=False)
    axes.set_xlabel("to rank")
    axes.set_ylabel("from rank")
    axes.set_xticks(range(len(sent_PP)))
    axes.set_yticks(range(len(sent_PP)))
    axes.spines[:].set_visible(False)
