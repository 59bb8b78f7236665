"""A picture of a bench run: each contender's time as a multiple of the floor's, one group of bars per workload."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ..desk.files import replacing
from ..validate.plot import COLORS, INK
from .results import WorkloadResult

PASSES = ("forward", "forward + backward")


def write_plot(path: Path, results: Sequence[WorkloadResult]) -> None:
    """Draw the workloads that ran to their end; matplotlib writes files of the type that ``path`` names."""
    finished = [result for result in results if result.floor and result.floor.both_ms]
    figure = Figure(figsize=(max(7.0, 2.0 * len(finished)), 8), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    if finished:
        above, below = figure.subplots(2, 1)
        for place, axes in enumerate((above, below)):
            _draw_bars(axes, finished, place)
        handles, labels = above.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    else:
        figure.text(0.5, 0.5, "no workload ran to its end", ha="center", size="x-large", color=INK)
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix.removeprefix(".").lower(), dpi=150)


def _draw_bars(axes: Axes, results: Sequence[WorkloadResult], place: int) -> None:
    """``place``: of the pass in PASSES."""
    names = list(dict.fromkeys(line.name for result in results for line in result.lines if line is not result.floor))
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        drawn = [
            (at, result.ratios(line)[place])
            for at, result in enumerate(results)
            for line in result.lines
            if line.name == name and line.both_ms
        ]
        if not drawn:
            continue
        left = np.array([at for at, _ in drawn]) + (i - (len(names) - 1) / 2) * width
        color = COLORS[i % len(COLORS)]
        bars = axes.bar(left, [ratio for _, ratio in drawn], width=0.9 * width, color=color, label=name)
        axes.bar_label(bars, fmt="%.1f", size="small", color=INK, padding=1)
    axes.axhline(1, color=INK, linewidth=1, linestyle="--", label="floor" if names else None)
    axes.set_xticks(range(len(results)), [_label(result, place) for result in results])
    axes.set_ylabel("x floor")
    axes.set_title(f"Time of {PASSES[place]} over the floor's", loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#EEEEEE")
    axes.set_axisbelow(True)


def _label(result: WorkloadResult, place: int) -> str:
    floor = result.floor
    assert floor is not None
    milliseconds = median((floor.forward_ms, floor.both_ms)[place])
    return f"{result.name}\n(floor {milliseconds:.3g} ms)"
