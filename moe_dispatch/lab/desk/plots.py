"""Plots as files: which types there are, and how one is written."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .output import replacing

# Okabe and Ito's colours, which colour-blind readers can tell apart too.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
INK = "#333333"


def check_plot(path: Path) -> None:
    """Raise ValueError unless the end of the name is a file type that matplotlib writes."""
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(
            f"{path} is no file type for a plot; its name has to end in one of {', '.join(known)}, "
            f"e.g. {path.stem}.png"
        )


def new_figure(*, width: float, height: float, w_pad: float, h_pad: float) -> Figure:
    """An empty figure of ``width`` x ``height`` inches, with ``w_pad`` and ``h_pad`` inches around its plots."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=w_pad, h_pad=h_pad))
    FigureCanvasAgg(figure)
    return figure


def say_empty(figure: Figure, text: str) -> None:
    """One line in the middle of a figure that has nothing to show."""
    figure.text(0.5, 0.5, text, ha="center", size="x-large", color=INK)


def save(figure: Figure, path: Path) -> None:
    """Write ``figure``; ``path`` passed :func:`check_plot`.

    Raises:
        OutputError: it could not be written.
    """
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix.removeprefix(".").lower(), dpi=150)
