"""The plot of a run shows losses, placement and traffic."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from moe_dispatch.lab.desk.plots import check_plot
from moe_dispatch.lab.validate.plot import most_spread, write_plot
from moe_dispatch.lab.validate.results import RowResult
from tests.support.lab.made_up_results import AGREEING, broken_off, differing

DIFFERING = differing(replace(AGREEING, name="wrong [red]"), "gradients", 0.25)
BROKEN = broken_off(replace(AGREEING, name="broken"), "rank 1 raised\nsomething [bold]")


def words_of_plot(path: Path, rows: list[RowResult]) -> str:
    """All the words in the plot of ``rows``."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text, not as outlines
        write_plot(path, rows)
    return " ".join(text.strip() for text in ElementTree.parse(path).getroot().itertext() if text.strip())


def test_plot_shows_losses_placement_and_traffic_of_the_most_spread_row(tmp_path: Path) -> None:
    narrow = replace(
        AGREEING, name="one rank", rank_of_token_BL=((0, 0, 0), (0, 0, 0)), rows_sent_PP=((9, 0), (0, 0))
    )
    short = replace(AGREEING, name="B = 1", shape=(1, 3), rank_of_token_BL=((0, 1, 2),))
    rows = [narrow, short, AGREEING, replace(DIFFERING, dtype="float32"), BROKEN]
    path = tmp_path / "out.svg"
    texts = words_of_plot(path, rows)
    for text in (
        "Loss of each step, float64",
        "Loss of each step, float32",
        "one process",
        "wrong [red]",
        "tolerance",
    ):
        assert text in texts
    assert "Which rank holds which token TP2, B x L = 2 x 3" in texts
    assert "rank 0 2 tokens" in texts
    assert "rank 3 1 tokens" in texts
    assert "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16" in texts
    assert "broken" not in texts


ALL_TO_ALL, ALL_TO_SELF = ((1, 1), (1, 1)), ((1, 0), (0, 1))


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ((((0, 1, 2, 3),), ALL_TO_ALL), (((0, 1), (0, 1)), ALL_TO_SELF)),  # several rows of the batch
        ((((0, 1), (2, 2)), ALL_TO_ALL), (((0, 0), (1, 1), (2, 2), (3, 3)), ALL_TO_SELF)),  # ranks
        ((((0, 0), (1, 1)), ALL_TO_ALL), (((0, 0), (1, 2)), ALL_TO_SELF)),  # ranks, then cut both ways
        ((((0, 0), (1, 1), (2, 2)), ALL_TO_ALL), (((0, 0), (1, 2), (1, 2)), ALL_TO_SELF)),  # cut both ways
        ((((0, 1), (2, 2)), ALL_TO_SELF), (((0, 1), (2, 2)), ALL_TO_ALL)),  # traffic
    ],
)
def test_plot_takes_the_row_that_shows_more(less: tuple[Any, Any], more: tuple[Any, Any]) -> None:
    rows = [
        replace(AGREEING, name=name, shape=(len(grid), len(grid[0])), rank_of_token_BL=grid, rows_sent_PP=sent)
        for name, (grid, sent) in (("LESS", less), ("MORE", more))
    ]
    for order in (rows, rows[::-1]):
        assert most_spread(order).name == "MORE"


@pytest.mark.parametrize("name", ["out.png", "out.PDF"])
def test_plot_has_the_type_of_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    check_plot(path)
    write_plot(path, [AGREEING])
    assert path.read_bytes().startswith({"out.png": b"\x89PNG", "out.PDF": b"%PDF"}[name])
    assert os.listdir(tmp_path) == [name]


def test_plot_of_nothing_says_so(tmp_path: Path) -> None:
    assert "no row ran to its end" in words_of_plot(tmp_path / "out.svg", [BROKEN])
