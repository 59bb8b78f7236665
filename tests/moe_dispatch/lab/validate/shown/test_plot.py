"""The plot of a run tells good from bad, and shows placement and traffic."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from moe_dispatch.lab import cli
from moe_dispatch.lab.desk.plots import check_plot
from moe_dispatch.lab.validate.results import Difference, RowResult
from moe_dispatch.lab.validate.runs import MatrixRun
from moe_dispatch.lab.validate.shown.placement import labelled, most_spread
from moe_dispatch.lab.validate.shown.plot import COLORS_OF_DECADES, GREENS, REDS, decade_of, write_plot
from tests.support.lab.made_up_results import AGREEING, broken_off, differing
from tests.support.lab.scripted_ranks import Script

DIFFERING = differing(replace(AGREEING, name="wrong $red$"), "gradients", 0.25)
BROKEN = broken_off(replace(AGREEING, name="broken"), "rank 1 raised\nsomething [bold]")


def words_of_plot(path: Path, *rows: RowResult, mutant: str = "") -> str:
    """All the words in the plot of ``rows``."""
    run = MatrixRun(mutant=mutant, planned=len(rows), references=(), rows=rows)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text, not as outlines
        write_plot(path, run, about="what, where, when")
    return " ".join(text.strip() for text in ElementTree.parse(path).getroot().itertext() if text.strip())


def test_the_title_is_the_verdict_and_each_cell_a_difference(tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    texts = words_of_plot(path, AGREEING, replace(AGREEING, dtype="float32"))
    for text in (
        "2 of 2 rows agree",
        "what, where, when",
        "float64",
        "float32",
        "logits ≤ 1e-10",
        "difference / limit",
        "1 = limit",
    ):
        assert text in texts
    assert texts.count("2e-16") == 8
    assert "!" not in texts


def test_what_differs_and_what_could_not_run_is_marked(tmp_path: Path) -> None:
    texts = words_of_plot(tmp_path / "out.svg", AGREEING, DIFFERING, BROKEN, differing(AGREEING, "loss", math.nan))
    assert '1 of 4 rows could not run: "broken" in float64' in texts
    assert texts.count("could not run") == 2
    assert "2e-01 !" in texts
    assert "nan !" in texts
    assert "wrong $red$" in texts  # not mathematics


def test_a_long_name_is_cut(tmp_path: Path) -> None:
    texts = words_of_plot(tmp_path / "out.svg", replace(AGREEING, name="x" * 50), replace(AGREEING, name="y" * 40))
    assert f" {'x' * 39}… {'y' * 40} " in texts


def colors_of_plot(path: Path, *rows: RowResult) -> str:
    """Those of the title: the plot's first text with a colour of its own."""
    words_of_plot(path, *rows)
    text = path.read_text()
    return text[text.index("<text") :][:400]


def test_the_title_is_green_or_red(tmp_path: Path) -> None:
    assert f"fill: {GREENS[0]}" in colors_of_plot(tmp_path / "out.svg", AGREEING)
    for row in (DIFFERING, BROKEN):
        assert f"fill: {REDS[-1]}" in colors_of_plot(tmp_path / "out.svg", AGREEING, row)


def test_the_title_names_the_mutant(tmp_path: Path) -> None:
    texts = words_of_plot(tmp_path / "out.svg", DIFFERING, mutant="m")
    assert "with the mutant m: 1 of 1 row differs" in texts


@pytest.mark.parametrize(
    ("ratio", "decade"),
    [
        (0.0, -4),
        (1e-9, -4),
        (1.1e-4, -3),
        (0.05, -1),
        (0.5, 0),
        (1.0, 0),
        (1.0 + 1e-15, 1),
        (9.0, 1),
        (11.0, 2),
        (1e9, 5),
        (math.inf, 5),
        (math.nan, 5),
    ],
)
def test_decades_up_to_the_limit_are_green(ratio: float, decade: int) -> None:
    found = Difference(quantity="loss", value=ratio * 2.0**-40, tolerance=2.0**-40, where="")
    assert decade_of(found) == decade
    assert found.agrees == (decade <= 0)
    assert COLORS_OF_DECADES[decade + 4] in (GREENS if found.agrees else REDS)


def test_a_run_whose_rows_all_broke_off_has_no_placement(tmp_path: Path) -> None:
    texts = words_of_plot(tmp_path / "out.svg", BROKEN)
    assert texts.count("could not run") == 2
    assert "Which rank holds which token" not in texts


def test_the_command_says_what_ran_when(script: Script, tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert cli.main(["validate", "tiny", "--plot", str(path)]) == 0
    assert "tiny, float32 and float64, 20" in path.read_text()
    assert " UTC, torch " in path.read_text()


def test_plot_shows_placement_and_traffic_of_the_most_spread_row(tmp_path: Path) -> None:
    narrow = replace(
        AGREEING, name="one rank", rank_of_token_BL=((0, 0, 0), (0, 0, 0)), rows_sent_PP=((9, 0), (0, 0))
    )
    short = replace(AGREEING, name="B = 1", shape=(1, 3), rank_of_token_BL=((0, 1, 2),))
    texts = words_of_plot(tmp_path / "out.svg", narrow, short, AGREEING, BROKEN)
    assert "Which rank holds which token TP2, B x L = 2 x 3" in texts
    assert "rank 0 2 tokens" in texts
    assert "rank 3 1 token " in texts
    assert "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16" in texts


def test_labels_of_ranks_that_hold_several_pieces_lie_apart() -> None:
    zigzag, stripes = (0, 0, 1, 2, 3, 3, 2, 1, 0), (0, 1, 2, 3) * 5
    assert [labelled(np.flatnonzero(np.array(zigzag) == rank), rank, 4) for rank in range(4)] == [
        (0, 1),  # the longer of two
        (2, 2),
        (6, 6),
        (4, 5),
    ]
    assert [labelled(np.flatnonzero(np.array(stripes) == rank), rank, 4)[0] for rank in range(4)] == [0, 5, 10, 15]


def test_positions_are_whole_numbers_where_there_is_one(tmp_path: Path) -> None:
    single = replace(AGREEING, shape=(2, 1), rank_of_token_BL=((0,), (1,)), rows_sent_PP=((1, 0), (0, 1)))
    texts = words_of_plot(tmp_path / "out.svg", single)
    assert "0 position in the sequence 0 1 row of the batch" in texts


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
    write_plot(path, MatrixRun(mutant="", planned=1, references=(), rows=(AGREEING,)), about="")
    assert path.read_bytes().startswith({"out.png": b"\x89PNG", "out.PDF": b"%PDF"}[name])
    assert os.listdir(tmp_path) == [name]
