"""A picture of a bench run: each contender's time as a multiple of the floor's, one group of bars per workload."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes

from ..desk.plots import COLORS, INK, new_figure, save, say_empty
from .results import WorkloadResult

PASSES = ("forward", "forward + backward")
HATCHES = ("", "///", "...")  # tell contenders apart that have one colour: there are more of them than colours


def write_plot(path: Path, results: Sequence[WorkloadResult]) -> None:
    """Draw the workloads that ran to their end; matplotlib writes files of the type that ``path`` names."""
    finished = [result for result in results if result.floor and result.floor.both_ms]
    names = contenders_in(finished)
    width = max(7.0, 2.0 * len(finished), 0.35 * len(names) * len(finished))
    figure = new_figure(width=width, height=8, w_pad=0.1, h_pad=0.1)
    if finished:
        above, below = figure.subplots(2, 1)
        for index, axes in enumerate((above, below)):
            _draw_bars(axes, finished, names, index)
        handles, labels = above.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=int(width / 2), frameon=False)
    else:
        say_empty(figure, "no workload ran to its end")
    save(figure, path)


def contenders_in(results: Sequence[WorkloadResult]) -> list[str]:
    """Those that have bars."""
    lines = [line for result in results for line in result.lines if line is not result.floor and line.both_ms]
    return list(dict.fromkeys(line.name for line in lines))


def style_of(place: int) -> tuple[str, str]:
    """Colour and hatch of the contender in this place."""
    return COLORS[place % len(COLORS)], HATCHES[place // len(COLORS) % len(HATCHES)]


def _draw_bars(axes: Axes, results: Sequence[WorkloadResult], names: Sequence[str], index: int) -> None:
    """``index``: of the pass in PASSES."""
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        drawn = [
            (at, result.ratios(line)[index])
            for at, result in enumerate(results)
            for line in result.lines
            if line.name == name and line.both_ms
        ]
        left = np.array([at for at, _ in drawn]) + (i - (len(names) - 1) / 2) * width
        color, hatch = style_of(i)
        ratios = [ratio for _, ratio in drawn]
        bars = axes.bar(
            left, ratios, 0.9 * width, color=color, hatch=hatch, edgecolor="white", linewidth=0, label=name
        )
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
