"""`--list` and `--dtypes`: which part of a config would run, or runs."""

import json
from pathlib import Path

import pytest

from moe_dispatch.lab import cli
from tests.support.lab.launches import TORCHRUN
from tests.support.lab.scripted_ranks import Script


def listed(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """What `validate --list` prints, line by line, runs of blanks as one."""
    assert cli.main(["validate", *argv, "--list"]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_rows_are_listed_with_their_layout_and_none_runs(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    head, _, *rows, last = listed(capsys)
    assert head == "row dp sp tp ep B x L data"
    assert len(rows) == 41
    for row in (
        "FSDP2 x4 4 1 1 1 3 x 129",
        "SP4, packed 1 4 1 1 1 x 129 5 documents, NaN at padding",
        "SP4, 2 heads 1 4 1 1 3 x 129 2 heads",
        "SP4 + EP4, window 40 1 4 1 4 3 x 129 window 40",
        "FSDP2 x SP2 + EP4, zigzag 2 2 1 4 3 x 129 zigzag",
        "TP2 x SP2 + EP4, striped 1 2 2 4 1 x 129 5 documents, stripes of 8",
        "2-D ring, packed, keep 1 4 1 4 1 x 129 5 documents, "
        "scheme with 2 to the heads, keys ring, kept, latent keys",
        "TP2 x ring2 + EP4 1 2 2 4 3 x 129 scheme with 1 to the heads, keys ring, latent keys",
    ):
        assert row in rows
    assert last == "41 rows in float32 and float64, each on 4 ranks"
    assert (script.calls, script.references, script.launches) == ([], [], set())


def test_a_selection_is_listed_as_it_would_run(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    lines = listed(capsys, "tiny", "--rows", "TP2 + EP2", "--dtypes", "float64")
    assert lines[2:] == ["TP2 + EP2 1 1 2 2 3 x 17", "1 row in float64, each on 2 ranks"]


@pytest.mark.parametrize(("rank", "prints"), [("0", True), ("1", False)])
def test_one_rank_of_a_launcher_prints_the_list(
    rank: str, prints: bool, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (TORCHRUN | {"RANK": rank, "LOCAL_RANK": rank}).items():
        monkeypatch.setenv(name, value)
    assert bool(listed(capsys, "tiny")) == prints


def test_a_list_cannot_be_written(script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "tiny", "--list", "--json", str(tmp_path / "out.json")]) == 2
    assert "--list runs nothing that could be written; leave out --json and --plot" in capsys.readouterr().err


def test_only_the_chosen_dtypes_run_and_the_json_says_so(script: Script, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert cli.main(["validate", "tiny", "--dtypes", "float64", "--json", str(path)]) == 0
    assert {dtype for _, dtype, _ in script.calls} == {"float64"}
    document = json.loads(path.read_text())
    assert document["config"]["dtypes"] == ["float64"]
    assert (document["planned"], document["verdict"]) == (3, "3 of 3 rows agree")


def test_a_dtype_that_the_config_does_not_have_is_refused(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "tiny", "--dtypes", "float46"]) == 2
    told = "no dtype of the config is named 'float46'; choose from: 'float32', 'float64' (did you mean 'float64'?)"
    assert told in capsys.readouterr().err
