"""What a run comes to, in one line, and how references are told apart. Ranks are scripted."""

from dataclasses import replace

import pytest

from moe_dispatch.lab.desk.exits import Stop
from moe_dispatch.lab.desk.ranks import launch
from moe_dispatch.lab.validate import matrix
from moe_dispatch.lab.validate.config.load import load_config
from moe_dispatch.lab.validate.config.tables import ValidateConfig
from moe_dispatch.lab.validate.results import RowResult
from moe_dispatch.lab.validate.runs import MatrixRun, MutantRun, MutantsRun, ReferenceRun
from moe_dispatch.lab.validate.sources import debug_rows
from moe_dispatch.lab.validate.text import batches_of_bytes, default_text
from tests.support.lab.configs import CONFIGS
from tests.support.lab.made_up_results import AGREEING, broken_off, differing

DEBUG = load_config(CONFIGS / "validate" / "deepseek_v3_debug.toml")


def verdict(*rows: RowResult, planned: int) -> str:
    return MatrixRun(mutant="", planned=planned, references=(), rows=rows).verdict


def test_the_verdict_counts_what_agrees_differs_broke_off_and_did_not_run() -> None:
    wrong, broken = differing(AGREEING, "loss", 0.5), broken_off(AGREEING, "it broke")
    assert verdict(*[AGREEING] * 58, planned=58) == "58 of 58 rows agree"
    assert verdict(AGREEING, planned=1) == "1 of 1 row agrees"
    assert verdict(AGREEING, wrong, wrong, planned=3) == (
        '2 of 3 rows differ: "TP2" in float64, "TP2" in float64; 1 agrees'
    )
    assert (
        verdict(*[broken] * 2, planned=2) == '2 of 2 rows could not run: "TP2" in float64, "TP2" in float64; 0 agree'
    )
    assert verdict(AGREEING, planned=58) == "57 of 58 rows did not run; 1 agrees"
    many = verdict(*(replace(wrong, name=f"r{i}") for i in range(9)), planned=9)
    assert many.endswith('"r3" in float64 and 5 more; 0 agree')
    assert "r4" not in many


def test_the_verdict_of_mutants_that_were_interrupted() -> None:
    caught = MutantRun(name="a", description="", rows=(differing(AGREEING, "loss", 0.5),))
    run = MutantsRun(planned=19, controls=(AGREEING,) * 2, mutants=(caught,), stop=Stop(reason="x", status=130))
    assert run.verdict == "1 of 19 mutants caught; 18 did not run; 2 of 2 controls agree"


def references_of(config: ValidateConfig) -> tuple[ReferenceRun, ...]:
    """What a run of ``config`` notes of its references."""
    text = batches_of_bytes(default_text(), [(row.batch, row.seq) for row in config.rows], steps=1)
    ranks = launch.SpawnedRanks(config.ranks, timeout=1.0)
    run = matrix.run_matrix(config, debug_rows(config), text, mutant="", ranks=ranks, watcher=Silent())
    assert run.planned == len(run.rows)
    return run.references


class Silent:
    def started(self, what: str) -> None: ...

    def finished(self, what: str, outcome: str) -> None: ...


@pytest.mark.usefixtures("script")
def test_no_two_references_of_the_packaged_config_have_the_same_label() -> None:
    references = references_of(DEBUG)
    labels = [(run.dtype, run.shape, run.special) for run in references]
    assert len(set(labels)) == len(labels) == 2 * len({row.data for row in debug_rows(DEBUG)})
    specials = {"", "5 documents", "5 documents, window 40", "2 heads", "1 head", "window 40"}
    assert {run.special for run in references} == specials


@pytest.mark.usefixtures("script")
def test_references_that_no_words_tell_apart_have_the_name_of_a_row() -> None:
    first = next(row for row in DEBUG.rows if row.documents)
    other = replace(first, name="other", documents=(*first.documents[:-1][::-1], first.documents[-1]))
    config = replace(DEBUG, rows=(first, other), dtypes=("float64",))
    assert [run.special for run in references_of(config)] == ["5 documents", "5 documents, as other"]
