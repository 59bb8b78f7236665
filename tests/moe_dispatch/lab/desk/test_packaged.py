"""Configs by path or by name."""

from pathlib import Path

import pytest

from moe_dispatch.lab.desk import packaged
from moe_dispatch.lab.desk.packaged import find_config
from tests.support.lab.configs import ROOT


@pytest.mark.parametrize(
    "name", ["tiny", "tiny.toml", "configs/tiny.toml", "configs/tiny", "configs/validate/tiny.toml"]
)
def test_a_packaged_config_is_found_from_everywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(name, tool="validate") == ROOT / "configs" / "validate" / "tiny.toml"
    (tmp_path / "configs/validate").mkdir(parents=True)
    for path in (
        tmp_path / "tiny",
        tmp_path / "tiny.toml",
        tmp_path / "configs/tiny.toml",
        tmp_path / "configs/tiny",
        tmp_path / "configs/validate/tiny.toml",
    ):
        path.touch()
    assert find_config(name, tool="validate") == Path(name)  # the file as given comes first


def test_configs_of_a_wheel_come_before_those_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, checkout = tmp_path / "wheel", tmp_path / "checkout"
    monkeypatch.setattr(packaged, "CONFIG_FOLDERS", (wheel, checkout))
    for path in (wheel / "validate/tiny.toml", checkout / "validate/tiny.toml", checkout / "validate/other.toml"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert find_config("tiny", tool="validate") == wheel / "validate/tiny.toml"
    assert find_config("other", tool="validate") == checkout / "validate/other.toml"


@pytest.mark.parametrize("name", ["mixtral_8x7b", "mixtral_8x7b.toml", "configs/plan/mixtral_8x7b"])
def test_a_packaged_plan_is_found_by_any_of_its_names(name: str) -> None:
    assert find_config(name, tool="plan", what="plan") == ROOT / "configs" / "plan" / "mixtral_8x7b.toml"


def test_each_tool_finds_its_own_configs_only() -> None:
    """``moe-dispatch bench tiny`` does not run a config of ``validate``."""
    assert find_config("configs/bench_tiny.toml", tool="bench") == ROOT / "configs" / "bench" / "bench_tiny.toml"
    for name, tool in (("tiny", "bench"), ("bench", "validate"), ("configs/plan/kimi_k2", "validate")):
        with pytest.raises(
            ValueError, match=f"config {name} does not exist; name a TOML file, or a packaged config: "
        ):
            find_config(name, tool=tool)
