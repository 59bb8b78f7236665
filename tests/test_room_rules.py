"""What a line may do in its room (DESIGN.md), read from the source."""

import ast

import pytest

from tests.support.source import (
    attributes,
    calls,
    code_lines,
    imported_files,
    imports,
    index_arithmetic,
    made_without_device,
    mutable_globals,
    of_torch_distributed,
    sources,
)

FILES = sources("moe_dispatch", "sp_attention")
TOOLS = ("moe_dispatch/lab/", "moe_dispatch/testing/", "moe_dispatch/judge/")
# What a user imports to train; the rest is for tests and for the commands.
LIBRARY = {
    name: source
    for name, source in FILES.items()
    if not name.startswith(TOOLS)
    and name.rpartition("/")[2] not in ("__main__.py", "pytest_plugin.py", "reference.py")
}
# Arithmetic of this kind is index arithmetic; elsewhere it needs a reason to be here.
INDEX_ARITHMETIC = {
    "moe_dispatch/layout/sharding.py": "which rank holds which token",
    "moe_dispatch/layout/grid.py": "which rows and places each rank holds",
    "moe_dispatch/layout/places.py": "where a place is among those that the ranks hold",
    "moe_dispatch/layout/partition.py": "the pieces themselves",
    "moe_dispatch/layout/stacked.py": "the tokens of all ranks",
    "moe_dispatch/layout/mesh.py": "sizes that divide the ranks",
    "moe_dispatch/wire/agreement.py": "a word of 31 bits",
    "moe_dispatch/plan/ids/format.py": "steps of 4 bytes",
    "moe_dispatch/plan/row_index.py": "the plan's running sums",
    "moe_dispatch/plan/counts/facts.py": "where choices of an expert are counted",
    "moe_dispatch/plan/counts/sent.py": "the token of a choice",
    "moe_dispatch/plan/static_index.py": "the slots of a plan of fixed sizes",
    "moe_dispatch/plan/node_pieces.py": "ranks of a node, and where a token arrives",
    "moe_dispatch/rows/buffer.py": "units of a row",
    "moe_dispatch/rows/sums.py": "three parts of each weight",
    "moe_dispatch/fused/launch.py": "vectors of a row",
    "moe_dispatch/fused/vectors.py": "16 bytes of values",
    "moe_dispatch/fused/kernels.py": "the source and the choice of an entry",
    "moe_dispatch/routing/choices.py": "where a record has a token",
    "moe_dispatch/layer/router.py": "how many experts a group has",
    "moe_dispatch/layer/experts.py": "rows of 16 bytes, and where each expert's rows end",
}
COLLECTIVES = {
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather_object",
    "irecv", "isend", "recv", "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor",
    "scatter_object_list", "send",
}  # fmt: skip
HOST_SYNCS = {"cpu", "item", "nonzero", "numpy", "tolist"}
MOVES_ROWS = ("dispatch", "combine", "functions", "row_exchange")
EVERY_LAYER = (
    *(f"rows/{name}" for name in MOVES_ROWS),
    "wire/exchange",
    "wire/regions",
    "layer/balance",
    "layer/moe",
    "layer/router",
)


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
        (made_without_device, "def f():\n    x = torch.zeros(2)\n    torch.ones(2, device=d)", {"f"}),
        (made_without_device, "x = y.new_zeros(2) + torch.zeros_like(y)", set()),
        (made_without_device, "x: T = field(default_factory=lambda: torch.tensor(1))", {""}),
        (mutable_globals, "a = []\nb: dict[int, int] = {}\nc = (1, 2)\nd = list(c)", {"a", "b", "d"}),
        (mutable_globals, "a = weakref.WeakKeyDictionary()\nb = [1] * 3\nc = {1} | {2}", {"a", "b", "c"}),
        (mutable_globals, "def f():\n    global cache\n    cache = 1\n    local = []", {"cache"}),
        (mutable_globals, "class A:\n    pass\nT = TypeVar('T')", set()),
        (lambda source: list(code_lines(source)), 'def f():\n    """a\n    b"""\n    return 1', [("f", 2)]),
    ],
)
def test_the_readers_see_what_they_look_for(read: object, source: str, found: object) -> None:
    assert callable(read)
    assert read(source) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ..b import c", {"p/b/c.py"}),
        ("from ..b.c import x", {"p/b/c.py"}),
        ("from ..b import x", {"p/b/__init__.py"}),
        ("def f():\n    import p.b.c", {"p/b/c.py"}),
        ("from . import d, torch", {"p/a/d.py"}),
        ("import torch\nfrom q import x", set()),
    ],
)
def test_imports_are_followed_to_their_files(source: str, found: set[str]) -> None:
    files = dict.fromkeys(("p/b/c.py", "p/b/__init__.py", "p/a/d.py"), "")
    assert imported_files("p/a/here.py", files | {"p/a/here.py": source}) == found


def test_the_rooms_are_there() -> None:
    assert set(INDEX_ARITHMETIC) <= set(LIBRARY)
    assert len(LIBRARY) > 40


@pytest.mark.parametrize(
    "name",
    [
        *(f"layout/{name}" for name in ("sharding", "grid", "places", "orders", "partition", "stacked")),
        "plan/row_index",
        "plan/counts/facts",
        "plan/counts/sent",
        "plan/counts/riding",
        "plan/static_index",
    ],
)
def test_index_arithmetic_knows_no_process_groups_and_no_floats(name: str) -> None:
    source = FILES[f"moe_dispatch/{name}.py"]
    assert of_torch_distributed(imports(source)) == set()
    words = set(attributes(source))
    assert words & {"distributed", "dist", "ProcessGroup"} == set()
    floats = {"float", "float16", "float32", "float64", "bfloat16", "is_floating_point", "double", "half"}
    assert words & floats == set()


def test_only_exchange_calls_the_all_to_all_and_only_once() -> None:
    rivals = "moe_dispatch/lab/bench/"  # floors and the textbook, which the exchange is timed against
    used = {name: attributes(source).count("all_to_all_single") for name, source in FILES.items()}
    ours = {name: count for name, count in used.items() if count and not name.startswith((rivals, TOOLS[1]))}
    assert ours == {"moe_dispatch/wire/exchange.py": 1}
    assert not [name for name, source in LIBRARY.items() if "all_to_all" in attributes(source)]


def test_other_collectives_of_the_library_are_sums_but_for_one_gather() -> None:
    used = {(name, call) for name, source in LIBRARY.items() for call in calls(source) if call in COLLECTIVES}
    assert used == {
        ("moe_dispatch/wire/exchange.py", "all_gather_single"),
        ("moe_dispatch/wire/exchange.py", "all_to_all_single"),
        ("moe_dispatch/layer/balance.py", "all_reduce"),
        ("moe_dispatch/training/clip.py", "all_reduce"),
        ("moe_dispatch/training/gradients.py", "all_reduce"),
        ("sp_attention/batch/loss.py", "all_reduce"),
        ("sp_attention/integrations/transformers/loss.py", "all_reduce"),
    }


def test_index_arithmetic_stays_in_its_rooms() -> None:
    of_moe = {name for name in LIBRARY if name.startswith("moe_dispatch/") and index_arithmetic(LIBRARY[name])}
    assert of_moe == set(INDEX_ARITHMETIC)
    for name in ("wire/exchange", "call/words", "call/ulysses", "batch/shard"):
        assert index_arithmetic(FILES[f"sp_attention/{name}.py"]) == set(), name


@pytest.mark.parametrize("name", [*(f"rows/{name}" for name in MOVES_ROWS), "wire/regions"])
def test_moving_rows_needs_no_arithmetic_on_indices(name: str) -> None:
    source = FILES[f"moe_dispatch/{name}.py"]
    makers = {"arange", "argsort", "sort", "cumsum", "bincount", "bucketize", "nonzero"}
    assert set(calls(source)) & makers == set()
    assert index_arithmetic(source) == set()


@pytest.mark.parametrize("name", EVERY_LAYER)
def test_what_runs_in_every_layer_does_not_wait_for_the_device(name: str) -> None:
    assert set(calls(FILES[f"moe_dispatch/{name}.py"])) & HOST_SYNCS == set()


def test_the_exchange_knows_nothing_of_what_it_moves() -> None:
    source = FILES["moe_dispatch/wire/exchange.py"]
    inside = {name for name in imports(source) if name.startswith(".")}
    assert {name.split(".")[1] for name in inside} == {"callers", "local_tensors", "policies"}
    assert "expert" not in source.lower()


def test_autograd_functions_are_few() -> None:
    found = {
        name
        for name, source in LIBRARY.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Function") for base in node.bases)
    }
    of_moe = {
        *(f"moe_dispatch/wire/{name}.py" for name in ("exchange", "regions")),
        "moe_dispatch/rows/functions.py",
        *(f"moe_dispatch/layer/{name}.py" for name in ("experts", "passed_on")),
    }
    assert {name for name in found if name.startswith("moe_dispatch/")} == of_moe


def test_the_library_needs_no_extras() -> None:
    optional = {"pydantic", "rich", "matplotlib", "numpy", "pytest", "triton", "safetensors"}
    used = {(name, part.split(".")[0]) for name, source in LIBRARY.items() for part in imports(source)}
    # Imported where a file is read or written, with the remedy where it is missing.
    of_files = {("moe_dispatch/routing/files.py", "safetensors")}
    # Imported where its kernels run.
    of_kernels = {("moe_dispatch/fused/kernels.py", "triton")}
    assert {(name, part) for name, part in used if part in optional} == of_files | of_kernels


def test_tensors_are_made_where_inputs_are() -> None:
    """Parameters and buffers of a module are made on the default device, as torch's own modules do."""
    scope = LIBRARY | {name: source for name, source in FILES.items() if name.endswith("/reference.py")}
    scope |= {name: source for name, source in FILES.items() if name.startswith(TOOLS[1:])}
    found = {(name, function) for name, source in scope.items() for function in made_without_device(source)}
    assert found == {
        ("moe_dispatch/layer/experts.py", "__init__"),
        ("moe_dispatch/layer/moe.py", "__init__"),
        ("moe_dispatch/layer/router.py", "__init__"),
        *((f"moe_dispatch/plan/{planner}.py", "new_report") for planner in ("counted", "hierarchical", "static")),
    }


# ---- state ---------------------------------------------------------------------------------------------


def test_no_module_holds_anything_that_can_change() -> None:
    found = {(name, variable) for name, source in FILES.items() for variable in mutable_globals(source)}
    assert {pair for pair in found if pair[1] != "__all__"} == set()


def test_only_the_pool_of_ranks_is_kept_per_process() -> None:
    cached = {
        name
        for name, source in FILES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if "cache" in ast.unparse(decorator) and ast.unparse(decorator) != "cached_property"  # of an object
    }
    assert cached == {"moe_dispatch/testing/pool.py"}


def test_no_environment_variable_changes_a_result() -> None:
    assert not [name for name, source in LIBRARY.items() if set(attributes(source)) & {"environ", "getenv"}]
