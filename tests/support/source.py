"""What the source of both packages says of itself: who imports whom, what is called, what is kept."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import moe_dispatch

ROOT = Path(moe_dispatch.__file__).parents[1]


def sources(*folders: str) -> dict[str, str]:
    """Path from the root -> text of every Python file below the folders."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


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


def imported_files(name: str, files: dict[str, str]) -> set[str]:
    """Which of ``files`` the file ``name`` imports, by absolute or relative names, also inside functions.

    An import from a package that has a module of that name is an import of the module.
    """
    found: set[str] = set()
    folder = name.split("/")[:-1]
    for node in ast.walk(ast.parse(files[name])):
        if isinstance(node, ast.Import):
            found |= {file for alias in node.names for file in _files_of(alias.name.split("."), files)[:1]}
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - (node.level - 1)] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:
                found |= set(_files_of([*module, alias.name], files) or _files_of(module, files))
    return found


def _files_of(module: list[str], files: dict[str, str]) -> list[str]:
    path = "/".join(module)
    return [file for file in (f"{path}.py", f"{path}/__init__.py") if file in files]


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """The files that are left when files that import none of the others are taken away again and again."""
    left = {name: set(targets) for name, targets in arrows.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


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


def made_without_device(source: str) -> set[str]:
    """The functions in which a call of torch makes a tensor on the default device; "" outside of functions."""
    makers = {
        "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones",
        "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
    }  # fmt: skip
    found: set[str] = set()

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in makers:
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and "device" not in {keyword.arg for keyword in node.keywords}:
                found.add(function)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
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
    """Does the expression make a container, or a tensor?"""
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    makers = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}
    makers |= {"WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "zeros", "ones", "empty", "tensor", "arange"}
    if isinstance(value, ast.Call):
        return bool(makers & set(calls(ast.unparse(value))[:1]))
    return isinstance(value, ast.BinOp) and (is_mutable(value.left) or is_mutable(value.right))


def code_lines(source: str) -> Iterator[tuple[str, int]]:
    """Name and length of every function, without its docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            docstring = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - docstring


def of_torch_distributed(names: Iterable[str]) -> set[str]:
    """Those that are ``torch.distributed`` or in it."""
    return {name for name in names if name == "torch.distributed" or name.startswith("torch.distributed.")}
