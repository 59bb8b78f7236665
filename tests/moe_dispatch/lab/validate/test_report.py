"""What a run tells: tables, progress, JSON and plot; and no output file is ever half written."""

import io
import json
import math
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from rich.console import Console

from moe_dispatch.lab.desk.files import check_output, replacing
from moe_dispatch.lab.validate import report
from moe_dispatch.lab.validate.config import load_config
from moe_dispatch.lab.validate.matrix import MatrixRun, MutantRun, MutantsRun, ReferenceRun
from moe_dispatch.lab.validate.plot import check_plot, write_plot
from moe_dispatch.lab.validate.results import RowResult
from tests.support.made_up_results import AGREEING, broken_off, differing

CONFIG = load_config(Path(__file__).parents[4] / "configs" / "tiny.toml")
REFERENCE = ReferenceRun(dtype="float64", shape=(2, 3), seconds=0.5)
DIFFERING = differing(replace(AGREEING, name="wrong [red]"), "gradients", 0.25)
BROKEN = broken_off(replace(AGREEING, name="broken"), "rank 1 raised\nsomething [bold]")


def matrix(*rows: RowResult, mutant: str = "") -> MatrixRun:
    return MatrixRun(mutant=mutant, references=(REFERENCE,), rows=rows)


def printed(run: MatrixRun | MutantsRun) -> list[str]:
    """What is printed for ``run``, line by line, runs of blanks as one."""
    console = Console(file=io.StringIO(), width=report.WIDTH)
    if isinstance(run, MatrixRun):
        report.print_matrix(console, run)
    else:
        report.print_mutants(console, run)
    assert isinstance(console.file, io.StringIO)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_table_has_the_reference_first_and_a_line_per_row() -> None:
    head, rule, reference, blank, row = printed(matrix(AGREEING))[1:6]
    assert head == "row dp sp tp ep B x L dtype logits loss gradients loss curve verdict s"
    assert set(rule) == {"─"}
    assert reference == "one process 2 x 3 float64 reference 0.5"
    assert blank == ""
    assert row == "TP2 2 1 2 4 2 x 3 float64 2.0e-16 2.0e-16 2.0e-16 blocks.0.weight 2.0e-16 agree 1.2"


def test_table_tells_what_differs_where_and_what_broke_off() -> None:
    lines = printed(matrix(DIFFERING, BROKEN))
    same = "2 1 2 4 2 x 3 float64"
    assert f"wrong [red] {same} 2.0e-16 2.0e-16 2.5e-01 blocks.0.weight 2.0e-16 DIFFERS: gradients 1.2" in lines
    assert f"broken {same} - - - - ERROR 1.2" in lines
    assert lines[-3:] == [
        "wrong [red], float64: gradients off by 2.5e-01 (tolerance 1e-10), most at blocks.0.weight",
        "broken, float64, broke off: rank 1 raised",
        "something [bold]",
    ]


def test_nan_differs() -> None:
    run = matrix(differing(AGREEING, "loss", math.nan))
    assert not run.agrees
    assert any("nan" in line and "DIFFERS: loss 1.2" in line for line in printed(run))


def mutant(name: str, *rows: RowResult) -> MutantRun:
    return MutantRun(name=name, description=f"the {name} bug", rows=rows)


def test_mutants_table_tells_which_quantity_in_which_row_caught_each() -> None:
    run = MutantsRun(
        controls=(replace(AGREEING, name="TP2 [red]"),),
        mutants=(
            mutant("late", AGREEING, DIFFERING),
            mutant("unseen", AGREEING, AGREEING),
            mutant("crash", AGREEING, BROKEN),
            mutant("elsewhere"),
        ),
    )
    assert not run.all_caught
    assert [line for line in printed(run) if line][2:] == [
        "(none) control: has to agree TP2 [red] agree",
        "late the late bug wrong [red] gradients caught",
        "unseen the unseen bug all 2 MISSED",
        "crash the crash bug all 2 ERROR",
        "elsewhere the elsewhere bug none in which it could show not run",
        "broken, float64, broke off: rank 1 raised",
        "something [bold]",
    ]


def test_mutants_are_caught_only_by_rows_that_agree_without_them() -> None:
    caught = mutant("caught", DIFFERING)
    assert MutantsRun(controls=(AGREEING,), mutants=(caught,)).all_caught
    assert not MutantsRun(controls=(DIFFERING,), mutants=(caught,)).all_caught
    assert not MutantsRun(controls=(AGREEING,), mutants=(caught, mutant("broken", BROKEN))).all_caught
    assert MutantsRun(controls=(AGREEING,), mutants=(caught, mutant("shows in no row"))).all_caught


def test_progress_is_one_plain_line_per_row_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO(), width=20)
    with report.ProgressDisplay(console, 2) as display:
        display.started("float64  a row with a name [red]")
        display.finished("float64  a row with a name [red]", "agree  1.0 s")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "float64  a row with a name [red]  agree  1.0 s\n"


def test_json_holds_every_number_and_the_verdict(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    report.write_json(path, CONFIG, matrix(AGREEING, differing(AGREEING, "loss", math.nan), mutant="m"))
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert not found["passed"]
    assert found["mutant"] == "m"
    assert found["config"]["rows"][2]["name"] == "TP2 + EP2"
    assert found["references"] == [{"dtype": "float64", "shape": [2, 3], "seconds": 0.5}]
    row, wrong = found["rows"]
    assert row["agrees"]
    assert row["rows_sent_PP"][3] == [13, 14, 15, 16]
    assert row["losses"] == [5.5, 5.25]
    assert row["differences"][2] == {
        "quantity": "gradients",
        "value": 2e-16,
        "tolerance": 1e-10,
        "where": "blocks.0.weight",
        "agrees": True,
    }
    assert wrong["disagreeing"] == ["loss"]
    assert wrong["differences"][1]["value"] is None


def test_json_of_mutants_tells_which_were_caught(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    runs = (mutant("a", DIFFERING), mutant("b", AGREEING), mutant("c"))
    report.write_json(path, CONFIG, MutantsRun(controls=(AGREEING,), mutants=runs))
    found = json.loads(path.read_text())
    assert [
        (run["could_show"], run["caught"], [row["disagreeing"] for row in run["rows"]]) for run in found["mutants"]
    ] == [
        (True, True, [["gradients"]]),
        (True, False, [[]]),
        (False, False, []),
    ]
    assert not found["passed"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with suppress(KeyboardInterrupt), replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.txt"]
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["out.txt"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with replacing(tmp_path / "link") as part:
        part.write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "x"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output(tmp_path / "out.json")
    with pytest.raises(ValueError, match=r"folder .*none does not exist; create it, or name another"):
        check_output(tmp_path / "none" / "out.json")
    with pytest.raises(ValueError, match=r"cannot be written: it is no regular file; name another"):
        check_output(tmp_path)
    with pytest.raises(ValueError, match="it is no regular file"):
        check_output(Path("/dev/null"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ValueError, match="is not writable; name another"):
        check_output(tmp_path / "out.json")


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
def test_plot_takes_the_row_that_shows_more(tmp_path: Path, less: tuple[Any, Any], more: tuple[Any, Any]) -> None:
    rows = [
        replace(AGREEING, name=name, shape=(len(grid), len(grid[0])), rank_of_token_BL=grid, rows_sent_PP=sent)
        for name, (grid, sent) in (("LESS", less), ("MORE", more))
    ]
    for order in (rows, rows[::-1]):
        assert "Which rank holds which token MORE" in words_of_plot(tmp_path / "out.svg", order)


@pytest.mark.parametrize("name", ["out.png", "out.PDF"])
def test_plot_has_the_type_of_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    check_plot(path)
    write_plot(path, [AGREEING])
    assert path.read_bytes().startswith({"out.png": b"\x89PNG", "out.PDF": b"%PDF"}[name])
    assert os.listdir(tmp_path) == [name]


def test_plot_of_nothing_says_so(tmp_path: Path) -> None:
    assert "no row ran to its end" in words_of_plot(tmp_path / "out.svg", [BROKEN])


@pytest.mark.parametrize("name", ["out", "out.txt", "out.json"])
def test_a_type_that_is_no_picture_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is no file type for a plot; .* png, .*, e\.g\. out\.png"):
        check_plot(Path(name))
