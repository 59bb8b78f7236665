"""`validate --hf`: rows of a Transformers model, its refusals, and what the table says of it."""

import json
import re
from pathlib import Path

import pytest

from moe_dispatch.lab import cli
from moe_dispatch.lab.desk.config_file import ConfigError
from moe_dispatch.lab.validate.config.load import load_matrix
from moe_dispatch.lab.validate.config.tables import HfConfig
from moe_dispatch.lab.validate.hf import HfSource, rows_of_hf
from moe_dispatch.lab.validate.matrix import run_matrix, run_mutants
from moe_dispatch.lab.validate.mutants.mutants import MUTANTS
from moe_dispatch.lab.validate.text import batches_of_bytes, default_text
from moe_dispatch.testing import RankPool
from tests.support.lab.configs import CONFIGS, ROOT
from tests.support.lab.scripted_ranks import Script
from tests.support.lab.small_matrix import QuietWatcher, UncoveredRanks
from tests.support.transformers.models import FAMILIES

MATRIX = load_matrix(CONFIGS / "subjects" / "transformers.toml", HfConfig)
EVERY_TYPE = load_matrix(CONFIGS / "subjects" / "every_type.toml", HfConfig)


def rows_of(what: str, *names: str):
    rows, _ = rows_of_hf(MATRIX, what)
    return [row for row in rows if not names or row.name in names]


def text_of(rows):
    return batches_of_bytes(default_text(), [row.layout.shape for row in rows], steps=MATRIX.train.steps)


def run(pool: RankPool, rows):
    ranks = UncoveredRanks(pool, 4)
    return run_matrix(MATRIX, rows, text_of(rows), mutant="", ranks=ranks, watcher=QuietWatcher())


def test_rows_agree_by_this_library_and_by_transformers_own_all_to_all(rank_pool: RankPool) -> None:
    found = run(rank_pool, rows_of("mixtral", "SP4 + EP4, empty, packed", "SP4 + EP4, packed, AllToAllEP"))
    assert found.verdict == "4 of 4 rows agree"
    assert len(found.references) == 2  # one process is the same for both
    for row in found.rows:
        worst = max(difference.value for difference in row.differences)
        assert worst < (2e-14 if row.dtype == "float64" else 1e-5)  # measured: 4e-15 and 2e-6
        lengths = [17, 1, 10, 5] if "AllToAllEP" in row.name else [20, 0, 13, 0]
        assert [row.rank_of_token_BL[1].count(rank) for rank in range(4)] == lengths
        assert bool(sum(map(sum, row.rows_sent_PP))) == ("AllToAllEP" not in row.name)


def test_a_mutant_is_caught(rank_pool: RankPool) -> None:
    rows = rows_of("mixtral", "SP4 + EP4, zigzag, left-padded")
    names = ("labels-shifted-in-shard", "kv-heads-rolled", "contiguous-positions", "weights-twice")
    found = run_mutants(
        MATRIX,
        rows,
        text_of(rows),
        mutants={name: MUTANTS[name] for name in names},
        ranks=UncoveredRanks(rank_pool, 4),
        watcher=QuietWatcher(),
    )
    # The last is of our own experts, which the model does not have.
    assert found.verdict == "3 of 3 mutants caught; 1 could show in none of the rows; 1 of 1 control agrees"


@pytest.mark.sweep
def test_every_type_agrees_or_is_refused_as_the_page_says(rank_pool: RankPool) -> None:
    rows, (_, *refused) = rows_of_hf(EVERY_TYPE, "every-type")
    page = (ROOT / "docs/transformers.md").read_text().partition("## Every type")[2].partition("\n## ")[0]
    page = page.partition("rows:")[2].partition("`layer_types`")[0]  # the lists
    agreeing, _, told_refused = page.partition("Refused")
    for told, names in ((agreeing, [row.source.told for row in rows]), (told_refused, refused)):
        assert set(re.findall(r"`([a-z0-9_]+)`", told)) == {name.split()[0] for name in names}
    ranks = UncoveredRanks(rank_pool, 4)
    found = run_matrix(EVERY_TYPE, rows, text_of(rows), mutant="", ranks=ranks, watcher=QuietWatcher())
    assert found.verdict == f"{2 * len(rows)} of {2 * len(rows)} rows agree"
    assert len(rows) >= 60  # of 30 types


@pytest.mark.sweep
@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_matrix(rank_pool: RankPool, name: str) -> None:
    assert run(rank_pool, rows_of(name)).verdict == "36 of 36 rows agree"


def test_the_command_judges_it_in_its_own_matrix(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    assert cli.main(["validate", "--hf", "hunyuan_v1_moe", "--dtypes", "float64", "--json", str(path)]) == 0
    *_, model, left_out, verdict = capsys.readouterr().out.splitlines()
    assert model.startswith("hunyuan_v1_moe: 2 layers of width 64, 8 heads, 8 of keys and values, 1 experts, ")
    assert left_out == (
        "SP4 + EP4, packed, AllToAllEP is left out: 1 experts of hunyuan_v1_moe are not even over ep = 4"
    )
    assert verdict == "17 of 17 rows agree"
    document = json.loads(path.read_text())
    assert document["subject"].startswith("hunyuan_v1_moe of Transformers 5.")
    assert document["notes"] == [model, left_out]


def test_rows_are_listed_with_lengths_and_padding(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "--hf", "mixtral", "--list"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "SP4 + EP4, left-padded 1 4 1 4 2 x 33 left padding 0, 9, lengths 17, 1, 10, 5" in lines
    assert "DP4 + EP4, packed 4 1 1 4 2 x 33 4 documents, lengths 33" in lines
    assert "SP4 + EP4, zigzag, left-padded 1 4 1 4 2 x 33 left padding 0, 9, zigzag" in lines
    assert "DP2 x SP2 + EP4, striped, packed 2 2 1 4 2 x 33 4 documents, stripes of 5" in lines
    assert lines[-1] == "18 rows in float32 and float64, each on 4 ranks"
    assert script.launches == set()


def test_every_type_has_rows_or_a_reason(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    types = ("hunyuan_v1_moe", "mixtral", "qwen3_next")
    monkeypatch.setattr("sp_attention.integrations.transformers.judged.causal_moe_types", lambda: types)
    assert cli.main(["validate", "--hf", "every-type"]) == 0
    assert [name for name, dtype, _ in script.calls if dtype == "float64"] == [
        f"{kind}, {row}" for kind in types[:2] for row in ("DP2 x SP2 + EP4, left-padded", "SP4 + EP4, packed")
    ]
    *_, count, refused, verdict = capsys.readouterr().out.splitlines()
    assert count.endswith("has 3 causal types with experts, of which 2 can be judged")
    assert refused.startswith(
        "qwen3_next is refused: qwen3_next has layers ['linear_attention'], which do not attend"
    )
    assert verdict == "8 of 8 rows agree"


def test_what_cannot_be_judged_is_exit_status_2(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "--hf", "qwen3_next"]) == 2
    assert "qwen3_next has layers ['linear_attention'], which do not attend" in capsys.readouterr().err
    assert cli.main(["validate", "--hf", "qwen3"]) == 2
    assert "moe-dispatch: Qwen3ForCausalLM has no experts" in capsys.readouterr().err
    assert script.launches == set()


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def find_spec(name: str) -> object:
        return None if name == "transformers" else name

    monkeypatch.setattr(cli, "find_spec", find_spec)
    assert cli.main(["validate", "--hf", "mixtral"]) == 3
    assert 'transformers cannot be imported, which this command needs; run: pip install "moe-dispatch[hf]"' in (
        capsys.readouterr().err
    )


def test_a_folder_has_a_digest_and_a_name_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert HfSource("mixtral", "", "moe_dispatch").told.startswith("mixtral of Transformers 5.")
    first = HfSource.digest_of(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    assert len({first, HfSource.digest_of(str(tmp_path)), HfSource.digest_of("mixtral")}) == 3
    assert HfSource.digest_of("mixtral") == ""


PADS, DP4 = "left_padding = [0, 9]", 'name = "DP4 + EP4, plain"\ndp = 4'


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("lengths = [17, 1, 10, 5]", "lengths = [17, 1, 10, 6]", "is [17, 1, 10, 6]; it has a length of at least 0"),
        (PADS, "left_padding = [0, 33]", "is [0, 33]; it has a number for each of batch = 2 rows, from 0 to below"),
        ("[12, 12], [21, 21]", "[13, 13], [19, 21]", "take [13, 21, 19, 14] places of batch = 2 rows of seq = 33;"),
        ("[14, 14]]", "[14, 14], [1, 1]]", "take 67 places; there are batch * seq = 66"),
        ("[12, 12], [21, 21]", "[12, 12], [20, 21]", "Transformers packs without padding: tokens = places"),
        (
            PADS,
            f'{PADS}\norder = "zigzag"',
            'order (row "SP4 + EP4, left-padded") is "zigzag" beside lengths, and has',
        ),
        (PADS, f'{PADS}\norder = "zigzig"', "zigzig"),
        (PADS, f"{PADS}\nwindow = 4", "is 4; the model has its own windows: leave it out"),
        (PADS, f"{PADS}\ndocuments = [[33, 33], [33, 33]]", "leave out documents or left_padding"),
        (DP4, DP4.replace("dp = 4", "dp = 2\ntp = 2"), "is 2; Transformers' models are not cut over tp here"),
    ],
)
def test_rules_of_its_rows(tmp_path: Path, old: str, new: str, problem: str) -> None:
    wrong = tmp_path / "wrong.toml"
    text = (CONFIGS / "subjects/transformers.toml").read_text()
    assert old in text
    wrong.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        load_matrix(wrong, HfConfig)
    assert problem in " ".join(str(error.value).split())
