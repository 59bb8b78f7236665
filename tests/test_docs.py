"""The pages of docs/: their code runs and prints what they show, and what they name exists."""

import importlib
import re
from inspect import signature
from pathlib import Path
from types import ModuleType

import pytest

import moe_dispatch
import moe_dispatch.integrations.transformers
import moe_dispatch.testing
import sp_attention.integrations.transformers
import sp_attention.integrations.transformers.judged
from moe_dispatch.lab import cli
from moe_dispatch.testing import RankPool

from .support.markdown import PAGES, ROOT, anchors, fences, links

WITH_CODE = [page for page in sorted((ROOT / "docs").glob("*.md")) if fences(page, "python")]


def module_of_page(page: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's code as a module that ranks can import; what its blocks do as scripts are its ``main_...()``."""
    blocks = enumerate(fences(page, "python"))
    source = "\n\n".join(x.replace('if __name__ == "__main__":', f"def main_{i}():") for i, x in blocks)
    name = f"page_{page.stem.replace('-', '_')}"
    (directory / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(directory)
    return importlib.import_module(name)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_code_of_a_page_prints_what_the_page_shows(
    page: Path,
    request: pytest.FixtureRequest,
    rank_pool: RankPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(moe_dispatch.testing, "run_ranks", rank_pool.run)
    monkeypatch.syspath_prepend(ROOT / "examples")  # one page builds on another example
    module = module_of_page(page, tmp_path, monkeypatch)
    for name, script in list(vars(module).items()):
        if name.startswith("main_"):
            script()
    assert capsys.readouterr().out == "".join(fences(page, "text"))
    for name, shown_test in vars(module).items():
        if name.startswith("test_"):
            shown_test(*(request.getfixturevalue(fixture) for fixture in signature(shown_test).parameters))


def test_pages_show_the_plan_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan"]) == 0
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for page in (ROOT / "README.md", ROOT / "docs/planning.md"):
        shown = {line.strip() for line in page.read_text().splitlines() if line.startswith("8 x 8")}
        assert len(shown) >= 2, page
        assert shown <= set(printed), page


def test_the_page_shows_the_plan_of_attention_as_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert cli.main(["plan", "qwen3_235b"]) == 0
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    (shown,) = (x for x in fences(ROOT / "docs/planning.md", "console") if x.startswith("Attention:"))
    assert [line for line in shown.splitlines() if line.strip() not in printed] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_files_that_a_page_names_exist(page: Path) -> None:
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|\$ )make (?:[A-Z]+=\S+ )?([a-z]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"`((?:moe_dispatch|sp_attention|tests|configs|examples|docs)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name
    for command in re.findall(r"python -m moe_dispatch (\w+)", text):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])


def test_the_design_fits_a_screen() -> None:
    assert max(len(line) for line in (ROOT / "DESIGN.md").read_text().splitlines()) <= 100


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs/index.md"
    pages = {page.stem for page in index.parent.glob("*.md")} - {"index"}
    assert {link.removesuffix(".md") for link in links(index) if link.endswith(".md")} == pages
    entries = {line for block in fences(index, "{toctree}") for line in block.splitlines() if line[:1].isalpha()}
    assert entries == pages | {f"api/{page.stem}" for page in (ROOT / "docs/api").glob("*.md")}


def test_every_public_name_is_in_the_reference_once() -> None:
    importlib.import_module("tests.support.torchtitan")  # before it is imported
    pages = {
        "moe_dispatch": [moe_dispatch],
        "torchtitan": [importlib.import_module("moe_dispatch.integrations.torchtitan")],
        "testing": [moe_dispatch.testing],
        "sp_attention": [sp_attention],
        "transformers": [
            moe_dispatch.integrations.transformers,
            sp_attention.integrations.transformers,
            sp_attention.integrations.transformers.judged,
        ],
    }
    for page, modules in pages.items():
        text = (ROOT / f"docs/api/{page}.md").read_text()
        documented = re.findall(r"^\.\. auto(?:function|class|exception):: (\w+)", text, re.MULTILINE)
        assert sorted(documented) == sorted(name for module in modules for name in module.__all__)


def test_the_page_of_transformers_shows_its_example() -> None:
    assert fences(ROOT / "docs/transformers.md", "python") == [(ROOT / "examples/transformers_moe.py").read_text()]
