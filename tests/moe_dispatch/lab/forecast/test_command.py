"""The command: tables, JSON, packaged plans, wrong input."""

import json
import re
from pathlib import Path

import pytest

from moe_dispatch.lab import cli
from tests.support.lab.configs import CONFIGS

PLANS = CONFIGS / "plan"


def test_the_command_from_8_to_512_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert cli.main(["plan", "deepseek_v3", "--nodes", "1", "64", "--zipf", "1", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(out.read_text())
    assert [each["ranks"] for each in document["predictions"]] == [8] * 6 + [512] * 6
    assert [each["scheme"] for each in document["predictions"]] == [
        "row per choice",
        "row per rank",
        "row per node",
    ] * 4
    assert {each["routing"] for each in document["predictions"]} == {"uniform", "zipf 1"}
    assert [config["cluster"]["nodes"] for config in document["configs"]] == [1, 64]
    assert "512 ranks for 256 experts: 256 of them hold none." in printed
    assert "Uniform routing draws a token's groups at random" in printed
    assert "64 x 8" in printed
    of_8, *of_many = document["plans"]
    assert (of_8["ranks"], of_8["form"]) == (8, "by ids")
    assert [(each["ranks"], each["form"]) for each in of_many] == [(n, "by counts") for n in (64, 256, 512, 1024)]
    assert document["by_counts_from_ranks"] == 11
    assert "plan_dispatch sends ids to every rank on fewer than 11 ranks" in printed
    assert re.search(rf"\n *512  by counts +{of_many[2]['by_ids'] / 1e3:.1f} +\d", printed)


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.toml")), ids=lambda path: path.stem)
def test_packaged_plans(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", path.stem]) == 0
    assert "row per node" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("dim = 7168", "dim = 0", "model.dim is 0; it has to be an int of at least 1, e.g. dim = 7168"),
        ("dim = 7168", "", "model.dim is missing; it has to be an int of at least 1, e.g. dim = 7168"),
        ("top_k = 8", "topk = 8", "model.topk is not a known key; did you mean top_k?"),
        ("top_k = 8", "top_k = 200", "model.top_k is 200, but a token reaches 128 experts; choose at most as many"),
        ("groups = 8  ", "groups = 7  ", "model.groups is 7, but there are 256 experts; it has to divide them"),
        ("limited_groups = 4", "limited_groups = 9", "model.limited_groups is 9 of 8 groups"),
        ("nodes = 8", "nodes = 1024", "is 8192 ranks; plan for at most 4096"),
        (
            '"bfloat16"',
            '"int8"',
            'model.dtype is \'int8\'; it has to be "float64", "float32", "bfloat16" or "float16"',
        ),
        ("[load]", "[load", "is not valid TOML"),
    ],
)
def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, told: str) -> None:
    text = (PLANS / "deepseek_v3.toml").read_text()
    assert old in text
    path = tmp_path / "my.toml"
    path.write_text(text.replace(old, new, 1))
    assert cli.main(["plan", str(path)]) == 2
    assert told in capsys.readouterr().err


def test_a_plan_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "nothing"]) == 2
    assert "config nothing does not exist; name a TOML file, or a packaged plan: 'deepseek_v2_lite'" in (
        capsys.readouterr().err
    )
    assert cli.main(["plan", "mixtral_8x7"]) == 2
    assert "(did you mean 'mixtral_8x7b'?)" in capsys.readouterr().err
    assert cli.main(["plan", "deepseek_v3", "--tokens", "999999999999999999"]) == 2
    assert "load.tokens_per_rank is 999999999999999999; it has to be" in capsys.readouterr().err
    assert cli.main(["plan", "--json", str(tmp_path / "none" / "out.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err


def test_a_full_disk_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "write_text", full)
    assert cli.main(["plan", "mixtral_8x7b", "--json", "out.json"]) == 3
    out, err = capsys.readouterr()
    assert "row per node" in out
    assert err == "moe-dispatch: out.json was not written (No space left on device)\n"
