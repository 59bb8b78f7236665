"""Which room a line may be in (DESIGN.md), read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import moe_dispatch
import sp_attention

ROOT = Path(moe_dispatch.__file__).parent
MODULES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}
ATTENTION_ROOT = Path(sp_attention.__file__).parent
ATTENTION = {
    f"sp_attention/{path.relative_to(ATTENTION_ROOT)}": path.read_text(encoding="utf-8")
    for path in sorted(ATTENTION_ROOT.rglob("*.py"))
}
LIBRARY = {  # what a user imports to train; the rest is for tests and for `validate`
    name
    for name in MODULES
    if not name.startswith(("lab/", "testing/")) and name not in ("__main__.py", "pytest_plugin.py", "reference.py")
}
MAIN_JOB = {name for name in MODULES if name.startswith("lab/")}  # these import both packages
# Arithmetic of this kind is index arithmetic; elsewhere it needs a reason to be here.
INDEX_ARITHMETIC = {
    "layout/sharding.py": "which rank holds which token",
    "layout/partition.py": "the pieces themselves",
    "plan/row_index.py": "the plan's running sums",
    "plan/counted.py": "the plan; a status word of two bytes",
    "plan/ids_exchange.py": "bytes of a message",
    "plan/group_tokens.py": "steps of all messages",
    "plan/static_index.py": "the slots of a plan of fixed sizes",
    "rows/buffer.py": "words of a row",
    "rows/sums.py": "three parts of each weight",
    "layer/router.py": "how many experts a group has",
    "layer/experts.py": "rows of 16 bytes, and where each expert's rows end",
    "wire/agreement.py": "a word of 31 bits",
    "layout/mesh.py": "sizes that divide the ranks",
}
# Tables that no code writes to.
CONSTANT_TABLES = {
    ("lab/cli.py", "MODULES_OF_EXTRA"),
    ("lab/validate/config.py", "TABLES"),
    ("lab/validate/config.py", "DEFAULT_OF_ROW"),
}
COLLECTIVES = {
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather_object",
    "irecv", "isend", "recv", "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor",
    "scatter_object_list", "send",
}  # fmt: skip
HOST_SYNCS = {"cpu", "item", "nonzero", "numpy", "tolist"}


# ---- what is read from a source --------------------------------------------------------------------


def imports(source: str) -> set[str]:
    """Full names of the modules that ``source`` imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module} | {f"{module}.{alias.name}".replace("..", ".") for alias in node.names}
    return names


def attributes(source: str) -> list[str]:
    """Every ``x.name`` and every bare name, once per use."""
    nodes = list(ast.walk(ast.parse(source)))
    return [node.attr for node in nodes if isinstance(node, ast.Attribute)] + [
        node.id for node in nodes if isinstance(node, ast.Name)
    ]


def calls(source: str) -> list[str]:
    """The last part of every called name."""
    functions = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        function.attr if isinstance(function, ast.Attribute) else function.id
        for function in functions
        if isinstance(function, ast.Attribute | ast.Name)
    ]


def index_arithmetic(source: str) -> set[str]:
    """The operators and functions that turn one index into another."""
    found = {name for name in calls(source) if name in ("cumsum", "divmod", "bucketize", "searchsorted")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Mod | ast.FloorDiv):
            found.add("%" if isinstance(node.op, ast.Mod) else "//")
    return found


def mutable_globals(source: str) -> set[str]:
    """Names bound to a list, dict, set or other container at module level, and names made global in functions."""
    tree = ast.parse(source)
    found = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            targets, value = [node.target], node.value
        else:
            continue
        if value is not None and is_mutable(value):
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    makers = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}
    makers |= {"WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "zeros", "ones", "empty", "tensor", "arange"}
    if isinstance(value, ast.Call):
        return bool(makers & set(calls(ast.unparse(value))[:1]))
    return isinstance(value, ast.BinOp) and (is_mutable(value.left) or is_mutable(value.right))


def of_torch_distributed(names: Iterable[str]) -> set[str]:
    return {name for name in names if name == "torch.distributed" or name.startswith("torch.distributed.")}


@pytest.mark.parametrize(
    ("read", "source", "found"),
    [
        (imports, "def f():\n    import torch.distributed as dist", {"torch.distributed"}),
        (imports, "from torch import distributed, nn", {"torch", "torch.distributed", "torch.nn"}),
        (imports, "from .a import b", {".a", ".a.b"}),
        (imports, "from . import a", {".", ".a"}),
        (calls, "dist.all_reduce(x); f(g)(1)", ["all_reduce", "f"]),
        (attributes, "x = dist.send", ["send", "x", "dist"]),
        (index_arithmetic, "a % b", {"%"}),
        (index_arithmetic, "a //= b", {"//"}),
        (index_arithmetic, "x.cumsum(0) + divmod(a, b)[0]", {"cumsum", "divmod"}),
        (index_arithmetic, "a + b * c / d", set()),
        (mutable_globals, "a = []\nb: dict[int, int] = {}\nc = (1, 2)\nd = list(c)", {"a", "b", "d"}),
        (mutable_globals, "a = weakref.WeakKeyDictionary()\nb = [1] * 3\nc = {1} | {2}", {"a", "b", "c"}),
        (mutable_globals, "def f():\n    global cache\n    cache = 1\n    local = []", {"cache"}),
        (mutable_globals, "class A:\n    pass\nT = TypeVar('T')", set()),
    ],
)
def test_the_readers_see_what_they_look_for(read: object, source: str, found: object) -> None:
    assert callable(read)
    assert read(source) == found


# ---- rooms -----------------------------------------------------------------------------------------


def test_the_rooms_are_there() -> None:
    named = {
        "layout/sharding.py",
        "layout/partition.py",
        "wire/exchange.py",
        "plan/counted.py",
        "rows/dispatch.py",
        "wire/regions.py",
        "layer/moe.py",
    }
    assert named <= LIBRARY
    assert set(INDEX_ARITHMETIC) <= LIBRARY
    assert "lab/validate/debug_model/parallel.py" in MODULES


@pytest.mark.parametrize(
    "name", ["layout/sharding.py", "layout/partition.py", "plan/row_index.py", "plan/static_index.py"]
)
def test_index_arithmetic_knows_no_process_groups_and_no_floats(name: str) -> None:
    assert of_torch_distributed(imports(MODULES[name])) == set()
    words = set(attributes(MODULES[name]))
    assert words & {"distributed", "dist", "ProcessGroup"} == set()
    assert (
        words & {"float", "float16", "float32", "float64", "bfloat16", "is_floating_point", "double", "half"} == set()
    )


def test_only_exchange_calls_the_all_to_all_and_only_once() -> None:
    rivals = {
        "lab/bench/contenders/floor.py",
        "lab/bench/contenders/textbook.py",
    }  # what the exchange is timed against
    both = MODULES | ATTENTION
    used = {name: attributes(source).count("all_to_all_single") for name, source in both.items()}
    assert {name: count for name, count in used.items() if count and name not in rivals} == {"wire/exchange.py": 1}
    assert not [name for name, source in both.items() if "all_to_all" in attributes(source)]


def test_other_collectives_of_the_library_are_the_one_sum_of_counts() -> None:
    used = {(name, call) for name in LIBRARY for call in calls(MODULES[name]) if call in COLLECTIVES}
    assert used == {("wire/exchange.py", "all_to_all_single"), ("layer/balance.py", "all_reduce")}
    used = {(name, call) for name, source in ATTENTION.items() for call in calls(source) if call in COLLECTIVES}
    assert used == {("sp_attention/batch/loss.py", "all_reduce")}


def test_index_arithmetic_stays_in_its_rooms() -> None:
    assert {name for name in LIBRARY if index_arithmetic(MODULES[name])} - set(INDEX_ARITHMETIC) == set()
    for name in ("wire/exchange", "call/words", "call/ulysses", "batch/shard"):
        assert index_arithmetic(ATTENTION[f"sp_attention/{name}.py"]) == set(), name


def test_moving_rows_needs_no_arithmetic_on_indices() -> None:
    for name in ("rows/dispatch.py", "rows/hierarchical.py", "wire/regions.py"):
        words = set(calls(MODULES[name]))
        assert words & {"arange", "argsort", "sort", "cumsum", "bincount", "bucketize", "nonzero"} == set()
        assert index_arithmetic(MODULES[name]) == set()


@pytest.mark.parametrize(
    "name",
    [
        "rows/dispatch.py",
        "rows/hierarchical.py",
        "wire/exchange.py",
        "layer/balance.py",
        "wire/regions.py",
        "layer/moe.py",
        "layer/router.py",
    ],
)
def test_what_runs_in_every_layer_does_not_wait_for_the_device(name: str) -> None:
    assert set(calls(MODULES[name])) & HOST_SYNCS == set()


def test_the_exchange_knows_nothing_of_what_it_moves() -> None:
    local = {name for name in imports(MODULES["wire/exchange.py"]) if name.startswith(".")}
    assert local == set()
    assert "expert" not in MODULES["wire/exchange.py"].lower()


def test_autograd_functions_are_the_exchange_and_those_that_move_rows_by_a_plan() -> None:
    found = {
        (name, node.name)
        for name in LIBRARY
        for node in ast.walk(ast.parse(MODULES[name]))
        if isinstance(node, ast.ClassDef) and any("Function" in ast.unparse(base) for base in node.bases)
    }
    halves = {"_StartDispatch", "_FinishDispatch", "_StartCombine", "_StartWeightedCombine", "_FinishCombine"}
    one_step = {("wire/exchange.py", "_ExchangeRows"), *(("rows/dispatch.py", half) for half in halves)}
    assert found == one_step | {("rows/hierarchical.py", "_ToNodes"), ("rows/hierarchical.py", "_FromNodes")}


# ---- imports ---------------------------------------------------------------------------------------


def test_the_library_imports_neither_the_main_job_nor_the_second_package() -> None:
    optional = {"pydantic", "rich", "matplotlib", "numpy", "pytest", "triton"}
    for name in LIBRARY:
        names = imports(MODULES[name])
        roots = {part.lstrip(".").split(".")[0] for part in names}
        assert roots & (optional | {"lab", "testing", "reference"}) == set(), name
    for name in MODULES.keys() - MAIN_JOB:
        assert not [part for part in imports(MODULES[name]) if part.split(".")[0] == "sp_attention"], name


def test_importing_does_no_work() -> None:
    program = """
import sys
import torch
already = set(sys.modules)
import moe_dispatch
wanted = {"pydantic", "rich", "matplotlib", "pytest", "triton", "sp_attention", "moe_dispatch.testing.pool"}
print(sorted(wanted & (set(sys.modules) - already)))
print(torch.cuda.is_initialized(), torch.distributed.is_initialized())
print([name for name in moe_dispatch.__all__ if not hasattr(moe_dispatch, name)])
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT.parent
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[]", "False False", "[]"]


def test_the_public_names_are_those_of_the_contract() -> None:
    assert moe_dispatch.__all__ == sorted(moe_dispatch.__all__)
    contract = {
        "Partition", "TokenSharding", "plan_dispatch", "dispatch", "combine", "DispatchMetadata", "place_tokens",
        "gather_tokens", "exchange_rows", "build_mesh", "ParallelMesh", "TopKRouter", "GroupedExperts", "MoE",
    }  # fmt: skip
    assert contract <= set(moe_dispatch.__all__)


# ---- state -----------------------------------------------------------------------------------------


def test_no_module_holds_anything_that_can_change() -> None:
    both = MODULES | ATTENTION
    found = {(name, variable) for name, source in both.items() for variable in mutable_globals(source)}
    assert {pair for pair in found if pair[1] != "__all__"} - CONSTANT_TABLES == set()


def test_only_the_pool_of_ranks_is_kept_per_process() -> None:
    cached = {
        name
        for name, source in (MODULES | ATTENTION).items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if "cache" in ast.unparse(decorator) and ast.unparse(decorator) != "cached_property"  # of an object
    }
    assert cached == {"testing/pool.py"}


def test_no_environment_variable_changes_a_result() -> None:
    read = {name: MODULES[name] for name in LIBRARY} | ATTENTION
    assert not [name for name, source in read.items() if set(attributes(source)) & {"environ", "getenv"}]
