"""What a run tells: tables, and the same as JSON."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_dispatch.lab.desk.console import WIDTH
from moe_dispatch.lab.validate.config.load import load_config
from moe_dispatch.lab.validate.results import RowResult
from moe_dispatch.lab.validate.runs import MatrixRun, MutantRun, MutantsRun, ReferenceRun
from moe_dispatch.lab.validate.shown import report
from moe_dispatch.lab.validate.text import batches_of_bytes
from tests.support.lab.configs import CONFIGS
from tests.support.lab.made_up_results import AGREEING, broken_off, differing

CONFIG = load_config(CONFIGS / "validate" / "tiny.toml")
REFERENCE = ReferenceRun(dtype="float64", shape=(2, 3), special="", seconds=0.5)
DIFFERING = differing(replace(AGREEING, name="wrong [red]"), "gradients", 0.25)
BROKEN = broken_off(replace(AGREEING, name="broken"), "rank 1 raised\nsomething [bold]")


def matrix(*rows: RowResult, mutant: str = "") -> MatrixRun:
    return MatrixRun(mutant=mutant, planned=len(rows), references=(REFERENCE,), rows=rows)


def document(run: MatrixRun | MutantsRun) -> dict[str, Any]:
    corpus = batches_of_bytes(b"abcdef", [(2, 3)], steps=1, name="t")
    return report.document_of(CONFIG, run, text=corpus, about={"subject": "s"}, origin={"host": "h"})


def printed(run: MatrixRun | MutantsRun, width: int = WIDTH) -> list[str]:
    """What is printed for ``run``, line by line, runs of blanks as one."""
    console = Console(file=io.StringIO(), width=width)
    if isinstance(run, MatrixRun):
        report.print_matrix(console, run, notes=())
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
    assert row == "TP2 2 1 2 4 2 x 3 float64 2.0e-16 2.0e-16 2.0e-16 2.0e-16 agree 1.2"


def test_table_tells_what_differs_where_and_what_broke_off() -> None:
    lines = printed(matrix(DIFFERING, BROKEN))
    same = "2 1 2 4 2 x 3 float64"
    assert f"wrong [red] {same} 2.0e-16 2.0e-16 2.5e-01 ! 2.0e-16 DIFFERS 1.2" in lines
    assert f"broken {same} - - - - ERROR 1.2" in lines
    assert lines[-4:] == [
        "wrong [red], float64: gradients off by 2.5e-01 (tolerance 1e-10), most at blocks.0.weight",
        "broken, float64, broke off: rank 1 raised",
        "something [bold]",
        '1 of 2 rows differs: "wrong [red]" in float64; 1 of 2 rows could not run: "broken" in float64; 0 agree',
    ]


def test_the_table_of_the_packaged_config_fits_80_columns_and_is_whole_at_120() -> None:
    longest = replace(DIFFERING, name="FSDP2 x SP2 + EP2, packed", shape=(3, 129))
    lines = printed(matrix(AGREEING, longest), 80)
    assert lines[1] == "row dtype logits gradients loss curve verdict"
    assert "FSDP2 x SP2 + EP2, packed float64 2.0e-16 2.5e-01 ! 2.0e-16 DIFFERS" in lines
    assert "Left out: dp sp tp ep, B x L, loss, s; --json has all" in lines
    assert printed(matrix(AGREEING, longest), 120) == printed(matrix(AGREEING, longest))


def test_nan_differs() -> None:
    run = matrix(differing(AGREEING, "loss", math.nan))
    assert not run.agrees
    assert any("nan" in line and "DIFFERS 1.2" in line for line in printed(run))


def mutant(name: str, *rows: RowResult) -> MutantRun:
    return MutantRun(name=name, description=f"the {name} bug", rows=rows)


def test_mutants_table_tells_which_quantity_in_which_row_caught_each() -> None:
    run = MutantsRun(
        planned=4,
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
        "1 of 3 mutants caught; 1 could show in none of the rows; 1 of 1 control agrees",
    ]


def test_mutants_are_caught_only_by_rows_that_agree_without_them() -> None:
    caught = mutant("caught", DIFFERING)
    assert MutantsRun(planned=1, controls=(AGREEING,), mutants=(caught,)).all_caught
    assert not MutantsRun(planned=1, controls=(DIFFERING,), mutants=(caught,)).all_caught
    assert not MutantsRun(planned=2, controls=(AGREEING,), mutants=(caught, mutant("broken", BROKEN))).all_caught
    assert MutantsRun(planned=2, controls=(AGREEING,), mutants=(caught, mutant("shows in no row"))).all_caught


def test_json_holds_every_number_and_the_verdict(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    report.write_run(path, document(matrix(AGREEING, differing(AGREEING, "loss", math.nan), mutant="m")))
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert not found["passed"]
    assert (found["status"], found["status_means"], found["stopped"]) == (1, "something differs", "")
    assert found["host"] == "h"
    assert found["text"]["name"] == "t"
    assert (found["text"]["bytes"], found["text"]["used_bytes"]) == (6, 6)
    assert len(found["text"]["sha256_of_used"]) == 64
    assert found["mutant"] == "m"
    assert found["config"]["rows"][2]["name"] == "TP2 + EP2"
    assert found["references"] == [{"dtype": "float64", "shape": [2, 3], "special": "", "seconds": 0.5}]
    assert found["verdict"].startswith("1 of 2 rows differs: ")
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
    report.write_run(path, document(MutantsRun(planned=3, controls=(AGREEING,), mutants=runs)))
    found = json.loads(path.read_text())
    assert [
        (run["could_show"], run["caught"], [row["disagreeing"] for row in run["rows"]]) for run in found["mutants"]
    ] == [
        (True, True, [["gradients"]]),
        (True, False, [[]]),
        (False, False, []),
    ]
    assert not found["passed"]
