"""The fused kernels compile for GPUs that are not here, and read and write 16 bytes per thread there.

In a process of its own: the interpreter of other tests is chosen when triton is imported.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from moe_dispatch.testing import RankPool
from tests.support.compile import untraced

A100, H100, B200 = 80, 90, 100  # compute capability, times ten
VECTORS = {"ld.global.v4.b32", "st.global.v4.b32"}
SINGLE = {"ld.global.b64", "st.global.b64"}  # an index at a time: their number is any
INDEX, INT, UNITS, ROWS = "*i64", "i32", "*i16", "*bf16"
WIDE = {"VECTOR": 8, "BLOCK": 1024}
# Types of the arguments, the constants, and what has to be among the instructions.
KERNELS: dict[str, tuple[dict[str, str], dict[str, Any], set[str]]] = {
    "pack": (
        {"row_of": INDEX, "out": UNITS, "pitch": INT, "wide": UNITS, "wide_width": INT, "wide_pitch": INT}
        | {"a": UNITS, "a_pitch": INT, "b": UNITS, "b_pitch": INT, "c": UNITS, "c_pitch": INT},
        {**WIDE, "A": 12, "B": 0, "C": 0},
        VECTORS,
    ),
    "expand": (
        {"rows": UNITS, "pitch": INT, "row_of": INDEX, "out": UNITS, "width": INT}
        | {"column_of": INDEX, "value_out": UNITS},
        {**WIDE, "UNITS": 2},
        VECTORS,
    ),
    "sums": (
        {"rows": ROWS, "pitch": INT, "weight": "*fp32", "row_of_entry": INDEX, "first_entry": INDEX}
        | {"num_entries": INT, "num_sums": INT, "out": ROWS, "width": INT},
        {**WIDE, "WEIGHTED": True},
        VECTORS,
    ),
    "dots": (
        {"a": ROWS, "b": ROWS, "b_pitch": INT, "row_of_b": INDEX, "out": "*fp32", "width": INT},
        WIDE,
        {"ld.global.v4.b32"},  # one number is written
    ),
    "entries": (
        dict.fromkeys(("flat_of", "mine_of", "token_of", "received_of"), INDEX)
        | dict.fromkeys(("key_out", "token_out", "received_out", "choice_out"), INDEX)
        | {"count": INT, "K": INT, "num_tokens": INT},
        {"BLOCK": 512},
        SINGLE,
    ),
    "reorder": (
        dict.fromkeys(("entry_of", "a", "b", "c", "a_out", "b_out", "c_out", "row_of_out"), INDEX) | {"count": INT},
        {"BLOCK": 512},
        SINGLE,
    ),
}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    with pytest.MonkeyPatch.context() as environment, RankPool() as pool:
        environment.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield pool


def instructions(name: str, capability: int, **other: int) -> set[str]:
    """Accesses to global memory in the code of a kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moe_dispatch.fused import kernels, launch

    kernel = getattr(kernels, name)
    types, constants, _ = KERNELS[name]
    types = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    # Tensors start at a multiple of 16 bytes; launching finds that out.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"}
    source = ASTSource(kernel, types, constants | other, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.OPTIONS))
    return set(re.findall(r"(?:ld|st)\.global\S*", compiled.asm["ptx"]))


@untraced()
def found_and_wanted(capability: int) -> list[tuple[str, set[str], set[str]]]:
    return [(name, instructions(name, capability), wanted) for name, (_, _, wanted) in KERNELS.items()]


def anywhere() -> set[str]:
    return instructions("pack", H100, VECTOR=1)


@pytest.mark.parametrize("capability", [A100, H100, B200])
def test_rows_are_read_and_written_as_vectors(compiler: RankPool, capability: int) -> None:
    ((*kernels,),) = compiler.run(found_and_wanted, 1, capability)
    for name, found, wanted in kernels:
        assert wanted <= found, name


def test_rows_that_start_anywhere_are_not(compiler: RankPool) -> None:
    (found,) = compiler.run(anywhere, 1)
    assert not found & VECTORS
