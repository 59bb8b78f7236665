"""Subjects of a user: found by file or package, refused with what is missing, and judged as the debug model is."""

from pathlib import Path

import pytest

from moe_dispatch.lab import cli
from moe_dispatch.lab.desk.config_file import ConfigError
from moe_dispatch.lab.validate import matrix
from moe_dispatch.lab.validate.config.load import load_matrix
from moe_dispatch.lab.validate.config.tables import SubjectConfig
from moe_dispatch.lab.validate.matrix import run_matrix, run_mutants
from moe_dispatch.lab.validate.mutants.mutants import MUTANTS
from moe_dispatch.lab.validate.run import run_reference_of
from moe_dispatch.lab.validate.sources import UserSource, rows_of_user
from moe_dispatch.lab.validate.text import batches_of_bytes, default_text
from moe_dispatch.testing import RankPool
from tests.support.lab.configs import CONFIGS, ROOT
from tests.support.lab.scripted_ranks import Script
from tests.support.lab.small_matrix import QuietWatcher, UncoveredRanks

EXAMPLE = f"{ROOT / 'examples/subject.py'}:MySubject"
MATRIX = load_matrix(CONFIGS / "subjects" / "matrix.toml", SubjectConfig)
FUNCTIONS = """
def whole(layout): ...
def share(whole, layout, mesh): ...
def step_whole(model, token_BL, layout): ...
def step_share(model, token_BL, layout, mesh): ...
def whole_gradient(name, gradient, layout, mesh): ...
"""


def example_rows(*names: str):
    return [row for row in rows_of_user(MATRIX, UserSource.of(EXAMPLE)) if row.name in names]


def text_of(rows):
    return batches_of_bytes(default_text(), [row.layout.shape for row in rows], steps=MATRIX.train.steps)


def test_the_subject_of_the_documentation_agrees(rank_pool: RankPool) -> None:
    """FSDP2, with expert and sequence parallelism, and with ranks that have no row."""
    rows = example_rows("DP2 x SP2 + EP2", "DP2 x SP2 + EP4, B = 1")
    assert len(rows) == 2
    ranks = UncoveredRanks(rank_pool, 4)
    found = run_matrix(MATRIX, rows, text_of(rows), mutant="", ranks=ranks, watcher=QuietWatcher())
    assert found.verdict == "4 of 4 rows agree"
    for row in found.rows:
        assert row.words == ()
        assert not row.mutant_ran
        worst = max(difference.value for difference in row.differences)
        assert worst < (9e-15 if row.dtype == "float64" else 5e-6)  # measured: 9e-16 and 5e-7
        assert sum(map(sum, row.rows_sent_PP)) > 0


def test_mutants_that_a_subject_runs_are_caught_in_it(rank_pool: RankPool) -> None:
    rows = example_rows("DP2 x SP2 + EP2")
    names = ("weights-twice", "labels-shifted-in-shard", "balance-of-the-shard", "gather-without-sum")
    found = run_mutants(
        MATRIX,
        rows,
        text_of(rows),
        mutants={name: MUTANTS[name] for name in names},
        ranks=UncoveredRanks(rank_pool, 4),
        watcher=QuietWatcher(),
    )
    assert {run.name: (run.could_show, run.caught) for run in found.mutants} == {
        "weights-twice": (True, True),
        "labels-shifted-in-shard": (True, True),
        "balance-of-the-shard": (False, False),  # of a loss that it does not have
        "gather-without-sum": (False, False),  # of a tensor-parallel region, and the subject has none
    }
    assert found.verdict == "2 of 2 mutants caught; 2 could show in none of the rows; 1 of 1 control agrees"


@pytest.mark.parametrize(
    ("text", "name", "problem"),
    [
        ("", ":Nope", "{file} has no Nope; it has to be FILE.py:NAME, package.module:NAME, or either without :NAME"),
        ("1 / 0", "", "{file} cannot be imported (ZeroDivisionError: division by zero)"),
        ("class A:\n    def __init__(self, x): ...", ":A", "A() failed (A.__init__() missing 1 required positional"),
        (
            FUNCTIONS.replace("def share(whole, layout", "def share(whole"),
            "",
            "cannot be judged: its share(whole, mesh)",
        ),
        (FUNCTIONS.partition("def whole_gradient")[0], "", "it has no whole_gradient(name, gradient, layout, mesh)"),
    ],
)
def test_what_is_no_subject_is_refused(tmp_path: Path, text: str, name: str, problem: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the text is compared)
        UserSource.of(f"{file}{name}")
    assert str(error.value).startswith(f"--subject {file}{name}")
    assert problem.format(file=file) in str(error.value)


def test_what_it_raises_in_one_process_is_told_and_is_no_difference(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "run_reference_of", run_reference_of)
    file = tmp_path / "raising.py"
    file.write_text(FUNCTIONS.replace("def whole(layout): ...", "def whole(layout): return layout.heads"))
    assert cli.main(["validate", "--subject", str(file), "--dtypes", "float64"]) == 3
    told = capsys.readouterr().err
    assert "the subject raised in one process\nTraceback" in told
    assert "AttributeError: 'Layout' object has no attribute 'heads'" in told


def test_a_missing_file_and_a_missing_package_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file /.*/absent\.py; it has to be FILE\.py:NAME"):
        UserSource.of(f"{tmp_path / 'absent.py'}:A")
    with pytest.raises(ValueError, match=r"cannot be imported \(No module named 'absent_package'\)"):
        UserSource.of("absent_package.module:A")


def test_a_module_of_functions_and_a_package_are_subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    by_file, by_name = UserSource.of(str(tmp_path / "my_functions.py")), UserSource.of("my_functions")
    assert by_file.digest == by_name.digest
    assert by_name.told == f"my_functions, SHA-256 {by_name.digest[:16]}"
    assert by_name.load().whole is by_name.load().whole


def test_the_command_judges_it_in_the_rows_of_its_own_config(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["validate", "--subject", EXAMPLE, "--dtypes", "float64"]) == 0
    assert [name for name, _, _ in script.calls] == [row.name for row in MATRIX.rows]
    assert capsys.readouterr().out.splitlines()[-1] == "7 of 7 rows agree"


def test_wrong_subjects_and_configs_are_exit_status_2(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "--subject", "absent.py:A"]) == 2
    assert "--subject absent.py:A: there is no file " in capsys.readouterr().err
    assert cli.main(["validate", "--subject", EXAMPLE, str(CONFIGS / "validate/tiny.toml")]) == 2
    assert "[model] is of the debug model, not of a subject; leave it out" in capsys.readouterr().err


def test_rules_of_meshes_hold_for_any_subject(tmp_path: Path) -> None:
    text = (CONFIGS / "subjects/matrix.toml").read_text()
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(text.replace('name = "DP4 + EP4"\ndp = 4\nep = 4', 'name = "DP4 + EP4"\ndp = 2\nep = 3'))
    with pytest.raises(ConfigError, match=r'rows\[1\]\.dp \(row "DP4 \+ EP4"\) is 2, and dp \* sp \* tp = 2'):
        load_matrix(wrong, SubjectConfig)
