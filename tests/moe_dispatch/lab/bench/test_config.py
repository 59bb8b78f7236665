"""A config of workloads is read, or refused with each problem."""

import re
from pathlib import Path

import pytest

from moe_dispatch.lab.bench.config import load_bench
from tests.support.lab.configs import CONFIGS

DISPATCH = '[[dispatch]]\nname = "x"\nranks = 2\ntokens = 4\ndim = 3\nexperts = 4\ntop_k = 2\ndtype = "float32"\n'
ULYSSES = """[[ulysses]]
name = "u"
ranks = 2
batch = 1
seq = 4
heads = 4
kv_heads = 2
head_dim = 3
dtype = "float32"
"""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it has no workload; add a [[dispatch]]"),
        ("a b", "is not valid TOML: Expected '='"),
        (DISPATCH * 2, 'two workloads are named "x"; name each once'),
        (DISPATCH.replace("tokens = 4", "tokens = [4]"), '"x": tokens has 1 numbers for 2 ranks'),
        (DISPATCH.replace("tokens = 4", "tokens = [4, -1]"), '"x": tokens is (4, -1); numbers have to be at least 0'),
        (
            DISPATCH.replace("tokens = 4", "tokens = 4.5"),
            "is 4.5; it has to be an int, or a list with one int per rank",
        ),
        (
            DISPATCH.replace("tokens = 4", 'tokens = [4, "5"]'),
            "dispatch[0].tokens[1] (workload \"x\") is '5'; it has to",
        ),
        (DISPATCH.replace("top_k = 2", "top_k = 5"), '"x": top_k is 5, of 4 experts'),
        (
            DISPATCH.replace("dim = 3", ""),
            'dispatch[0].dim (workload "x") is missing; it has to be an int of at least 1, e.g. dim = 1024',
        ),
        (
            DISPATCH.replace("dim = 3", 'dim = "3"'),
            "dispatch[0].dim (workload \"x\") is '3'; it has to be an int of at least 1, e.g. dim = 1024",
        ),
        (DISPATCH.replace("dim", "dims"), 'dispatch[0].dims (workload "x") is not a known key; did you mean dim?'),
        (
            DISPATCH.replace('"float32"', '"int8"'),
            'is \'int8\'; it has to be "bfloat16", "float16", "float32" or "float64", e.g. dtype = "bfloat16"',
        ),
        ("dispatch = 3", "dispatch is 3; it has to be a list of tables, e.g. [[dispatch]]"),
        ("dispatch = [3]", "dispatch[0] is 3; it has to be a table"),
        (ULYSSES.replace("kv_heads = 2", "kv_heads = 3"), '"u": kv_heads is 3; it has to divide heads, which is 4'),
        (
            ULYSSES.replace("ulysses", "attention") + "window = -2\n",
            'attention[0].window (workload "u") is -2; it has to be an int of at least -1, e.g. window = 256',
        ),
        (ULYSSES + "window = 2\n", 'ulysses[0].window (workload "u") is not a known key'),
        (
            ULYSSES.replace("ulysses", "attention").replace("= 2\nhead", "= 3\nhead"),
            '"u": kv_heads is 3; it has to divide',
        ),
        (ULYSSES.replace("seq = 4", "seq = [0, 0]"), '"u": seq is (0, 0); numbers have to be'),
    ],
)
def test_a_config_that_cannot_be_used_is_told_with_its_key(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "bench.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(problem)):
        load_bench(path)


def test_the_configs_of_the_project_load() -> None:
    names = [workload.name for workload in load_bench(CONFIGS / "bench" / "bench.toml").workloads]
    assert names == ["a", "b", "c", "a, Zipf", "a, uneven", "d", "e", "d, uneven", "1024 ranks"]
    shapes = [workload.shape for workload in load_bench(CONFIGS / "bench" / "attention.toml").workloads]
    of_all = "4 ranks, B 1, S {}, N 16, G 4, H 64, float32, causal"
    assert shapes == [of_all.format(4096), of_all.format(8192), of_all.format(4096) + ", window 256"]
