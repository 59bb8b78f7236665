"""Rules between the keys of a config: a broken one is told with a value that works."""

from pathlib import Path

import pytest

from tests.support.lab.config_problems import problems_of
from tests.support.lab.configs import TINY_TEXT

BROKEN_RULES = [
    (
        "dense_layers = 1",
        "dense_layers = 2",
        "model.dense_layers is 2 of 2 layers, leaving no MoE layer; it has to be below model.layers, "
        "e.g. dense_layers = 1",
    ),
    (
        "rope_head_dim = 4",
        "rope_head_dim = 5",
        "model.rope_head_dim is 5; RoPE turns pairs, so it has to be even, e.g. rope_head_dim = 6",
    ),
    (
        "\ngroups = 1",
        "\ngroups = 3",
        "model.groups is 3; groups of equal size have to hold the 4 experts, e.g. groups = 2",
    ),
    (
        "limited_groups = 1",
        "limited_groups = 2",
        "model.limited_groups is 2, of 1 groups; it has to be at most model.groups, e.g. limited_groups = 1",
    ),
    (
        "\ngroups = 1",
        "\ngroups = 4",
        "model.top_k is 2; a token reaches the 1 experts of its 1 of 4 groups, so it has to be at most that, "
        "e.g. top_k = 1",
    ),
    ('["float32", "float64"]', '["float32", "float32"]', 'dtypes lists "float32" 2 times; list it once'),
    (
        "[tolerance.float64]",
        "[tolerance.float46]",
        "tolerance.float64 is missing; each of dtypes needs tolerances, e.g. [tolerance.float64]",
    ),
    (
        'name = "TP2 + EP2"',
        'name = "FSDP2 x2"',
        'rows[0].name (row "FSDP2 x2") is used 2 times; give each row its own name',
    ),
    (
        "tp = 2\nep = 2",
        "tp = 1\nep = 2\nsp = 2\ndp = 2",
        'rows[2].dp (row "TP2 + EP2") is 2, and dp * sp * tp = 2 * 2 * 1 = 4; it has to be ranks = 2, '
        "e.g. dp = 1, sp = 2, tp = 1",
    ),
    (
        "tp = 2\nep = 2",
        "tp = 2\nep = 2\ndocuments = [[3, 4], [5, 5]]",
        'rows[2].documents (row "TP2 + EP2") take 9 places of batch = 3 rows of seq = 17; they are '
        "packed into one row: set batch = 1 and seq = 9",
    ),
    (
        "tp = 2\nep = 2",
        "tp = 2\nep = 2\nbatch = 1\nseq = 9\ndocuments = [[3, 4], [6, 5]]",
        'rows[2].documents (row "TP2 + EP2") is [[3, 4], [6, 5]]; each is [tokens, places], with '
        "0 <= tokens <= places",
    ),
    (
        "tp = 2\nep = 2",
        "tp = 2\nep = 2\ndp = 2",
        'rows[2].dp (row "TP2 + EP2") is 2, and dp * sp * tp = 2 * 1 * 2 = 4; it has to be ranks = 2, '
        "e.g. dp = 1, tp = 2",
    ),
    (
        "tp = 2\nep = 2",
        'tp = 2\nep = 2\nstripe = 4\norder = "zigzag"',
        'rows[2].stripe (row "TP2 + EP2") is 4 in the order "zigzag", which has no stripes; leave it out, or set '
        'order = "striped"',
    ),
    (
        "tp = 2\nep = 2",
        'tp = 2\nep = 2\nscheme = "gather"\nhead_ranks = 2',
        "rows[2].head_ranks (row \"TP2 + EP2\") is 2 in the scheme 'gather', which has none to choose; leave it out, "
        'or set scheme = "two_dimensional"',
    ),
    (
        "tp = 2\nep = 2",
        'tp = 2\nep = 2\nkeys = "ring"',
        "rows[2].keys (row \"TP2 + EP2\") is 'ring' in the scheme 'ulysses', which has none to choose; leave it "
        'out, or set scheme = "two_dimensional"',
    ),
    (
        "tp = 2\nep = 2",
        'sp = 2\nscheme = "two_dimensional"\nhead_ranks = 4',
        'rows[2].head_ranks (row "TP2 + EP2") is 4; so many of the sp = 2 ranks are a team, and it has to divide sp: '
        "e.g. head_ranks = 2",
    ),
    (
        "tp = 2\nep = 2",
        'tp = 2\nep = 2\ndocuments_as = "mask"',
        'rows[2].documents_as (row "TP2 + EP2") is "mask" without documents; leave it out ("cu_seqlens"), or set '
        "documents",
    ),
    (
        "tp = 2\nep = 2",
        'sp = 2\nbatch = 1\nseq = 9\ndocuments = [[3, 9]]\ndocuments_as = "mask"\nnan_padding = true',
        'rows[2].nan_padding (row "TP2 + EP2") is true with documents_as = "mask", which a NaN goes through; '
        "leave out one of them",
    ),
    (
        "dp = 2\nep = 2",
        "dp = 2\nep = 3",
        'rows[1].ep (row "FSDP2 x2 + EP2") is 3; it has to divide dp * sp * tp = 2: set ep to 1 or 2',
    ),
    (
        "heads = 2",
        "heads = 3",
        'rows[2].tp (row "TP2 + EP2") is 2; it cuts model.heads = 3 into equal parts, so it has to divide '
        "it: set model.heads = 4, or another tp",
    ),
]


@pytest.mark.parametrize(("right", "wrong", "problem"), BROKEN_RULES)
def test_broken_rule_between_keys_is_told_with_a_value_that_works(
    tmp_path: Path, right: str, wrong: str, problem: str
) -> None:
    assert right in TINY_TEXT
    assert problem in problems_of(tmp_path, TINY_TEXT.replace(right, wrong, 1))


@pytest.mark.parametrize(
    ("ranks", "dp", "tp", "works"),
    [(6, 2, 2, "dp = 3, tp = 2"), (6, 2, 4, "dp = 2, tp = 3"), (5, 2, 2, "dp = 5, tp = 1")],
)
def test_a_mesh_of_the_wrong_size_is_told_one_that_works(
    tmp_path: Path, ranks: int, dp: int, tp: int, works: str
) -> None:
    rows = TINY_TEXT.index("[[rows]]")
    text = TINY_TEXT[:rows].replace("ranks = 2", f"ranks = {ranks}").replace("heads = 2", "heads = 4")
    problem = problems_of(tmp_path, f'{text}[[rows]]\nname = "X"\ndp = {dp}\ntp = {tp}')[0]
    assert problem.endswith(works)


def test_more_ranks_than_experts_in_a_group_is_refused(tmp_path: Path) -> None:
    text = TINY_TEXT.replace("experts = 4", "experts = 1", 1).replace("top_k = 2", "top_k = 1")
    assert problems_of(tmp_path, text.replace("dp = 2\nep = 2", "dp = 2\nep = 3"))[0].endswith("= 2: set ep to 1")
    assert problems_of(tmp_path, text)[-1] == (
        'rows[2].ep (row "TP2 + EP2") is 2 for 1 experts; every rank of a group holds at least one: '
        "lower ep, or raise model.experts"
    )
