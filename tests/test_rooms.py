"""The house of DESIGN.md: which room a file is in, how large rooms are, and who may import whom."""

import subprocess
import sys
from collections import Counter

import pytest

import moe_dispatch
import sp_attention
from tests.support.source import ROOT, circles, code_lines, imported_files, imports, sources

# From the ground up: a file imports from its own floor and from those below.
FLOORS = (
    ("moe_dispatch/errors.py",),
    ("moe_dispatch/layout/",),
    ("moe_dispatch/wire/", "moe_dispatch/fused/"),
    ("moe_dispatch/plan/",),
    ("moe_dispatch/rows/",),
    ("moe_dispatch/routing/",),
    ("moe_dispatch/layer/",),
    ("moe_dispatch/training/",),
    ("moe_dispatch/__init__.py", "moe_dispatch/internals.py"),
    ("moe_dispatch/judge/",),
    ("moe_dispatch/integrations/",),
    ("moe_dispatch/reference.py", "moe_dispatch/testing/"),
    ("moe_dispatch/pytest_plugin.py",),
    ("sp_attention/dtypes.py",),
    ("sp_attention/wire/",),
    ("sp_attention/blocks/",),
    ("sp_attention/work/",),
    ("sp_attention/attend/",),
    ("sp_attention/spread/",),
    ("sp_attention/call/",),
    ("sp_attention/batch/",),
    ("sp_attention/choice/",),
    ("sp_attention/reference.py",),
    ("sp_attention/parallel/",),
    ("sp_attention/__init__.py",),
    ("sp_attention/integrations/",),
    ("sp_attention/__main__.py",),
    ("moe_dispatch/lab/desk/", "moe_dispatch/lab/__init__.py"),
    ("moe_dispatch/lab/validate/", "moe_dispatch/lab/bench/", "moe_dispatch/lab/forecast/"),
    ("moe_dispatch/lab/cli.py",),
    ("moe_dispatch/__main__.py",),
)
MOST_FILES, MOST_LINES, MOST_TEST_LINES, MOST_FUNCTION_LINES = 12, 260, 330, 60
FILES, TESTS = sources("moe_dispatch", "sp_attention"), sources("tests")
FRONT_DOORS = {"moe_dispatch", "moe_dispatch.internals"}
# Each integration of the second package builds on that of the first, by its public names.
INTEGRATIONS = "sp_attention/integrations/", "moe_dispatch.integrations.transformers"


def floor_of(name: str) -> tuple[int, str]:
    """The floor of a file, and its room there."""
    rooms = [(i, room) for i, floor in enumerate(FLOORS) for room in floor if name.startswith(room)]
    assert len(rooms) == 1, f"{name} is in the rooms {rooms}"
    return rooms[0]


def test_every_file_is_in_one_room() -> None:
    rooms = {floor_of(name) for name in FILES}
    assert rooms == {(i, room) for i, floor in enumerate(FLOORS) for room in floor}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name: str) -> None:
    floor, room = floor_of(name)
    for imported in imported_files(name, FILES):
        below, other = floor_of(imported)
        assert below < floor or other == room, f"{name} imports {imported}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert circles({name: imported_files(name, FILES) - {name} for name in FILES}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_the_second_package_comes_in_by_the_front_doors() -> None:
    of_package = {name: source for name, source in FILES.items() if name.startswith("sp_attention/")}
    for name, source in of_package.items():
        doors = FRONT_DOORS | ({"moe_dispatch.testing"} if name.endswith("__main__.py") else set())
        doors |= {"moe_dispatch.reference"} if name.startswith("sp_attention/parallel/") else set()
        doors |= {INTEGRATIONS[1]} if name.startswith(INTEGRATIONS[0]) else set()
        doors |= {"moe_dispatch.testing"} if "/judged/" in name else set()
        modules = {module for module in imports(source) if module.split(".")[0] == "moe_dispatch"}
        inside = {module for module in modules if module not in doors and module.rpartition(".")[0] not in doors}
        assert inside == set(), name


def test_landings_are_short() -> None:
    counts = Counter(name.rpartition("/")[0] for name in FILES | TESTS)
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_files_are_short() -> None:
    too_long = {name: source.count("\n") for name, source in FILES.items() if source.count("\n") > MOST_LINES}
    too_long |= {name: source.count("\n") for name, source in TESTS.items() if source.count("\n") > MOST_TEST_LINES}
    assert too_long == {}


def test_functions_fit_a_screen() -> None:
    lengths = {(name, what): lines for name, source in FILES.items() for what, lines in code_lines(source)}
    assert {of: lines for of, lines in lengths.items() if lines > MOST_FUNCTION_LINES} == {}


def test_tests_mirror_the_tree() -> None:
    folders = {name.rpartition("/")[0] for name in FILES}
    for name in TESTS:
        folder = name.removeprefix("tests/").rpartition("/")[0]
        # A folder below that of a room sorts its tests.
        assert folder.startswith("support") or {folder, folder.rpartition("/")[0]} & (folders | {""}), name


@pytest.mark.parametrize("name", TESTS)
def test_no_test_module_imports_another(name: str) -> None:
    tests = {other for other in imported_files(name, TESTS) if other.rpartition("/")[2].startswith("test_")}
    assert tests - {name} == set()


# ---- what an import does -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_others_are_imported_in_the_rooms_of_their_slots(name: str) -> None:
    rooms = {
        "transformers": ("moe_dispatch/integrations/transformers/", "sp_attention/integrations/transformers/"),
        "torchtitan": ("moe_dispatch/integrations/torchtitan/",),
    }
    for other, of_other in rooms.items():
        assert name.startswith(of_other) or not any(module.split(".")[0] == other for module in imports(FILES[name]))
    # The last imports ours, when it is asked for a model of Transformers.
    of_any = sum(rooms.values(), ("moe_dispatch/lab/validate/hf.py",))
    assert name.startswith(of_any) or not any(".integrations" in module for module in imports(FILES[name]))


@pytest.mark.parametrize("package", ["moe_dispatch", "sp_attention"])
def test_importing_does_no_work(package: str) -> None:
    program = f"""
import sys
import torch
already = set(sys.modules)
import {package} as package
unwanted = {{"pydantic", "rich", "matplotlib", "pytest", "triton", "safetensors", "moe_dispatch.testing"}}
unwanted |= {{"torch._dynamo", "torch.distributed.tensor", "transformers", "torchtitan"}}
unwanted |= {{"sp_attention"}} - {{"{package}"}}
print(sorted(unwanted & (set(sys.modules) - already)))
print(torch.cuda.is_initialized(), torch.distributed.is_initialized())
print([name for name in package.__all__ if not hasattr(package, name)])
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[]", "False False", "[]"]


def test_the_public_names_are_those_of_the_contract_and_few_more() -> None:
    for package in (moe_dispatch, sp_attention):
        assert package.__all__ == sorted(package.__all__)
    contract = {
        "Partition", "TokenSharding", "plan_dispatch", "dispatch", "combine", "DispatchMetadata", "place_tokens",
        "gather_tokens", "exchange_rows", "build_mesh", "ParallelMesh", "TopKRouter", "GroupedExperts", "MoE",
    }  # fmt: skip
    assert contract <= set(moe_dispatch.__all__)
    assert len(moe_dispatch.__all__) + len(sp_attention.__all__) <= 70
