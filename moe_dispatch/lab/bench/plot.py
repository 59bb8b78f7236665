"""A picture of a bench run: each contender's time as a multiple of the floor's, one group of bars per workload."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes

from ..desk.plots import COLORS, INK, new_figure, save, say_empty
from .results import WorkloadResult

PASSES = ("forward", "forward + backward")


def write_plot(path: Path, results: Sequence[WorkloadResult]) -> None:
    """Draw the workloads that ran to their end; matplotlib writes files of the type that ``path`` names."""
    finished = [result for result in results if result.floor and result.floor.both_ms]
    figure = new_figure(width=max(7.0, 2.0 * len(finished)), height=8, w_pad=0.1, h_pad=0.1)
    if finished:
        above, below = figure.subplots(2, 1)
        for index, axes in enumerate((above, below)):
            _draw_bars(axes, finished, index)
        handles, labels = above.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    else:
        say_empty(figure, "no workload ran to its end")
    save(figure, path)


def _draw_bars(axes: Axes, results: Sequence[WorkloadResult], index: int) -> None:
    """``index``: of the pass in PASSES."""
    names = list(dict.fromkeys(line.name for result in results for line in result.lines if line is not result.floor))
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        drawn = [
            (at, result.ratios(line)[index])
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
    axes.set_xticks(range(len(results)), [_label(result, index) for result in results])
    axes.set_ylabel("x floor")
    axes.set_title(f"Time of {PASSES[index]} over the floor's", loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#EEEEEE")
    axes.set_axisbelow(True)


def _label(result: WorkloadResult, index: int) -> str:
    floor = result.timed_floor
    milliseconds = median((floor.forward_ms, floor.both_ms)[index])
    return f"{result.name}\n(floor {milliseconds:.3g} ms)"
