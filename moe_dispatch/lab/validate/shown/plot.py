"""A picture of a run: how far each quantity of each row is from its limit, and where tokens and rows are."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import SubFigure
from matplotlib.patches import Rectangle

from ....judge.results import QUANTITIES, Difference
from ...desk.plots import INK, new_figure, save
from ..results import RowResult
from ..runs import MatrixRun
from .placement import draw_placement

# By decades of difference / limit. The last one below the limit is decade 0; the first and last have no other end.
DECADES = range(-4, 6)
GREENS = ("#00694d", "#2a9070", "#5cb394", "#93d2b8", "#cfeade")
REDS = ("#fbd5c0", "#f3a17e", "#e36f4a", "#c63f25", "#8f1d14")
COLORS_OF_DECADES = (*GREENS, *REDS)
COLORMAP = ListedColormap(COLORS_OF_DECADES, bad="#eeeeee")  # bad: could not run
NORM = BoundaryNorm(np.arange(DECADES[0], DECADES[-1] + 2) - 0.5, len(DECADES))
DARK = (-4, -3, 3, 4, 5)  # decades whose colour needs white text

WIDTH, LINE_HEIGHT, ROW_HEIGHT, FRAME_HEIGHT = 13.0, 0.28, 0.25, 0.9  # inches
COLORS_HEIGHT, PLACEMENT_HEIGHT = 0.75, 3.6
MOST_TITLE, MOST_NAME = 90, 40  # characters in a line of the title, of a row's name


def write_plot(path: Path, run: MatrixRun, *, about: str) -> None:
    """Draw ``run``, of at least one row; ``path`` passed :func:`check_plot`.

    Args:
        about: a line below the verdict: what ran, where and when.
    """
    names = list(dict.fromkeys(row.name for row in run.rows))
    finished = [row for row in run.rows if not row.error]
    verdict = f"with the mutant {run.mutant}: {run.verdict}" if run.mutant else run.verdict
    lines = textwrap.wrap(verdict, MOST_TITLE)
    heights = [LINE_HEIGHT * (len(lines) + 2), FRAME_HEIGHT + ROW_HEIGHT * len(names), COLORS_HEIGHT]
    if finished:
        heights.append(PLACEMENT_HEIGHT)
    figure = new_figure(width=WIDTH, height=sum(heights), w_pad=0.12, h_pad=0.08)
    title, differences, colors, *placement = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[
        :, 0
    ]
    _draw_title(title, lines, about, GREENS[0] if run.agrees else REDS[-1])
    _draw_differences(differences, run.rows, names)
    _draw_colors(colors)
    if finished:
        draw_placement(placement[0], finished)
    save(figure, path)


def _draw_title(figure: SubFigure, lines: Sequence[str], about: str, color: str) -> None:
    line = 1 / (len(lines) + 2)  # half a line is free above, between and below
    style = {"x": 0.01, "va": "center", "parse_math": False}
    figure.text(
        y=1 - (0.5 + len(lines) / 2) * line, s="\n".join(lines), size="x-large", weight="bold", color=color, **style
    )
    figure.text(y=line, s=about, color=INK, **style)


def _draw_differences(figure: SubFigure, rows: Sequence[RowResult], names: Sequence[str]) -> None:
    """A heat map for each dtype: rows x quantities."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    all_axes = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    for axes, dtype in zip(all_axes, dtypes, strict=True):
        _draw_dtype(axes, {row.name: row for row in rows if row.dtype == dtype}, names)
        axes.set_title(dtype, loc="left", color=INK, weight="bold")
    wrong = {row.name for row in rows if not row.agrees}
    all_axes[0].set_yticks(range(len(names)), [_short(name) for name in names])
    for label, name in zip(all_axes[0].get_yticklabels(), names, strict=True):
        label.set(parse_math=False, color=REDS[-1] if name in wrong else INK)
        label.set_weight("bold" if name in wrong else "normal")


def _short(name: str) -> str:
    return name if len(name) <= MOST_NAME else f"{name[: MOST_NAME - 1]}…"


def _draw_colors(figure: SubFigure) -> None:
    """What the colours mean."""
    bar = figure.colorbar(ScalarMappable(NORM, COLORMAP), cax=figure.subplots(), orientation="horizontal")
    powers = DECADES[:-1]  # of ten, where one decade ends and the next starts
    labels = [f"1e{power:+d}" if power else "1 = limit" for power in powers]
    bar.set_ticks([power + 0.5 for power in powers], labels=labels)
    bar.set_label("difference / limit", color=INK)
    bar.outline.set_visible(False)
    bar.minorticks_off()


def _draw_dtype(axes: Axes, row_of_name: dict[str, RowResult], names: Sequence[str]) -> None:
    decade_RQ = np.full((len(names), len(QUANTITIES)), np.nan)
    limit_of_quantity: dict[str, float] = {}
    for place, name in enumerate(names):
        row = row_of_name.get(name)
        if row is not None and row.error:
            _draw_broken_off(axes, place)
        for column, difference in enumerate(row.differences if row is not None else ()):
            limit_of_quantity[difference.quantity] = difference.tolerance
            decade_RQ[place, column] = decade = decade_of(difference)
            value = f"{difference.value:.0e}" if difference.value else "0"
            text, weight = (value, "normal") if difference.agrees else (f"{value} !", "bold")
            color = "white" if decade in DARK else INK
            axes.text(column, place, text, ha="center", va="center", size="small", color=color, weight=weight)
    axes.imshow(np.ma.masked_invalid(decade_RQ), cmap=COLORMAP, norm=NORM, aspect="auto", interpolation="nearest")
    limits = [f"\n≤ {limit_of_quantity[name]:.0e}" if name in limit_of_quantity else "" for name in QUANTITIES]
    axes.set_xticks(range(len(QUANTITIES)), [name + limit for name, limit in zip(QUANTITIES, limits, strict=True)])
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelcolor=INK)
    axes.set_xticks(np.arange(1, len(QUANTITIES)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(names)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)


def _draw_broken_off(axes: Axes, place: int) -> None:
    left, width = -0.5, len(QUANTITIES)
    axes.add_patch(
        Rectangle((left, place - 0.5), width, 1, facecolor="#eeeeee", edgecolor="#bbbbbb", hatch="////", zorder=2)
    )
    box = {"boxstyle": "square,pad=0.15", "facecolor": "#eeeeee", "edgecolor": "none"}
    style = {"ha": "center", "va": "center", "size": "small", "weight": "bold", "zorder": 3}
    axes.text(left + width / 2, place, "could not run", color=REDS[-1], bbox=box, **style)


def decade_of(difference: Difference) -> int:
    """Of difference / limit, in DECADES: 0 for a tenth of the limit to the limit, 1 for up to ten times as much."""
    ratio = difference.value / difference.tolerance
    if not ratio < math.inf:  # NaN too
        return DECADES[-1]
    decade = math.ceil(math.log10(ratio)) if ratio > 0 else DECADES[0]
    least, most = (DECADES[0], 0) if difference.agrees else (1, DECADES[-1])
    return min(max(decade, least), most)
