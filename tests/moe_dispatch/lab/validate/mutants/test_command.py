"""`--mutant` and `--mutants`: what they run, what they print and how they exit."""

import json
from pathlib import Path

import pytest

from moe_dispatch.lab import cli
from moe_dispatch.lab.validate.mutants.mutants import MUTANTS
from tests.support.lab.scripted_ranks import Script

MUTANT = next(iter(MUTANTS))
MUTANTS_ANYWHERE = (  # in plain data parallelism too
    "weights-twice",
    "gradients-averaged",
    "stale-plan",
    "weights-without-gradient",
    "bias-in-weights",
    "weights-in-bfloat16",
)


def test_a_mutant_that_is_caught_fails_the_run_and_names_the_quantity(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.results["TP2 + EP2", MUTANT] = "loss curve"
    assert cli.main(["validate", "tiny", "--mutant", MUTANT]) == 1
    assert {call[2] for call in script.calls} == {MUTANT}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"mutant {MUTANT} ({MUTANTS[MUTANT].description}): the run fails, as it has to; differing: loss curve"
    )


def test_a_mutant_that_every_row_agrees_with_is_missed(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "tiny", "--mutant", MUTANT]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("MISSED, every row agrees")


def test_mutants_run_where_they_can_show_until_caught_in_float64(script: Script, tmp_path: Path) -> None:
    for name in MUTANTS:
        script.results["FSDP2 x2 + EP2", name] = script.results["TP2 + EP2", name] = "logits"
    script.results["FSDP2 x2 + EP2", "weights-twice"] = ""  # goes on to the next row
    path = tmp_path / "out.json"
    assert cli.main(["validate", "tiny", "--mutants", "--json", str(path)]) == 0
    rows_of = {name: [row for row, _, mutant in script.calls if mutant == name] for name in MUTANTS}
    assert rows_of["weights-twice"] == ["FSDP2 x2 + EP2", "TP2 + EP2"]
    assert rows_of["stale-plan"] == ["FSDP2 x2 + EP2"]
    assert rows_of["gather-without-sum"] == ["TP2 + EP2"]  # there is nothing to gather elsewhere
    assert {dtype for _, dtype, _ in script.calls} == {"float64"}
    assert len([row for row, _, mutant in script.calls if not mutant]) == 2  # controls run once
    assert len(json.loads(path.read_text())["mutants"]) == len(MUTANTS)


def test_a_missed_mutant_fails_the_run_of_all(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    for name in MUTANTS_ANYWHERE[1:]:
        script.results["FSDP2 x2", name] = "logits"
    assert cli.main(["validate", "tiny", "--mutants", "--rows", "FSDP2 x2"]) == 1
    assert capsys.readouterr().out.count("MISSED") == 1


def test_a_mutant_that_can_show_in_none_of_the_rows_is_not_run(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in MUTANTS_ANYWHERE:
        script.results["FSDP2 x2", name] = "logits"
    assert cli.main(["validate", "tiny", "--mutants", "--rows", "FSDP2 x2"]) == 0
    assert {mutant for _, _, mutant in script.calls} == {"", *MUTANTS_ANYWHERE}
    assert capsys.readouterr().out.count("none in which it could show") == len(MUTANTS) - len(MUTANTS_ANYWHERE)
