"""The rooms of the tools, read from the source: each tool by itself, with what they share in ``desk``."""

import ast
from pathlib import Path

import pytest

import moe_dispatch.lab

LAB = Path(moe_dispatch.lab.__file__).parent
TOOLS = ("validate", "bench", "forecast")


def rooms_imported_by(path: Path) -> set[str]:
    """The folders of ``lab`` that a module imports from, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                full = module / alias.name
                if LAB in full.parents:
                    found.add(full.relative_to(LAB).parts[0])
    return found


def test_the_reader_sees_an_import_of_another_room() -> None:
    assert rooms_imported_by(LAB / "bench" / "plot.py") == {"desk", "bench"}
    assert rooms_imported_by(LAB / "validate" / "arguments.py") == {"desk", "validate"}  # one is inside a function
    assert rooms_imported_by(LAB / "cli.py") == {"desk", *TOOLS}


@pytest.mark.parametrize("room", ["desk", *TOOLS])
def test_a_tool_imports_itself_and_the_desk_only(room: str) -> None:
    paths = sorted((LAB / room).rglob("*.py"))
    assert len(paths) > 5
    for path in paths:
        assert rooms_imported_by(path) <= {"desk", room}, path
