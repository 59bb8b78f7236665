"""What crosses the wire: two collectives forward and two backward, on every rank in the same order, and no byte more
than the tokens, heads and header need.
"""

from operator import add

import pytest
import torch

from moe_dispatch.testing import RankPool
from tests.support.attention.case import Case, named_case
from tests.support.attention.sent import Sent, counted
from tests.support.attention.whole import Whole, shares_of_ulysses

HEADER_NUMBERS = (16, 8)  # of each pair of ranks, in the two exchanges forward; none in their gradients
WIRED = {
    "the shape table": named_case(2, "none", (3, 2), num_heads=(4, 2), widths=(6, 4)),
    "a rank without tokens": named_case(3, "causal", (3, 0, 4), num_heads=(6, 3), widths=(6, 4)),
    "ranks without heads": named_case(4, "causal", (3, 1, 0, 1), num_heads=(2, 1), widths=(6, 4)),
    "groups over ranks": named_case(4, "causal", (3, 1, 2, 1), num_heads=(12, 3), widths=(6, 4)),
    "fewer key/value heads than ranks": named_case(4, "none", (2, 2, 2, 1), num_heads=(8, 2), order="LB"),
    "cross-attention": named_case(3, "cross causal", (1, 1, 3), kv_seq=(4, 0, 3), num_heads=(4, 2), widths=(6, 4)),
    "documents": named_case(3, "padded", (6, 0, 10), batch=1, num_heads=(4, 2), widths=(6, 4)),
    "sinks": named_case(2, "sinks", (3, 2), num_heads=(3, 1), widths=(6, 4)),
}


def kv_heads(case: Case, rank: int) -> int:
    """Key/value heads that the rank's query heads use."""
    start, per_group = sum(case.head_sizes[:rank]), case.num_heads[0] // case.num_heads[1]
    return len({head // per_group for head in range(start, start + case.head_sizes[rank])})


def planned(case: Case, rank: int, element_bytes: int) -> list[Sent]:
    """Both exchanges forward, with their headers, then both backward, from the definition: who needs what of whom.
    What a rank needs of itself is in none."""
    width, v_width = case.widths

    def spread(source: int, to: int) -> int:
        queries = case.seq[source] * case.head_sizes[to] * width
        keys_and_values = case.kv_seq[source] * kv_heads(case, to) * (width + v_width)
        return case.batch * (queries + keys_and_values) * element_bytes

    def collect(source: int, to: int) -> int:
        return case.batch * case.seq[to] * case.head_sizes[source] * v_width * element_bytes

    forward = []
    for crossing in (spread, collect):
        pairs = [
            (0, 0) if other == rank else (crossing(rank, other), crossing(other, rank)) for other in range(case.ranks)
        ]
        forward.append(Sent(tuple(to for to, _ in pairs), tuple(back for _, back in pairs)))
    backward = [Sent(sent.back, sent.to) for sent in reversed(forward)]
    with_headers = []
    for sent, numbers in zip(forward, HEADER_NUMBERS, strict=True):
        header = [numbers * element_bytes * (other != rank) for other in range(case.ranks)]
        with_headers.append(Sent(tuple(map(add, sent.to, header)), tuple(map(add, sent.back, header))))
    return [*with_headers, *backward]


# ---- cases: what the ranks run -------------------------------------------------------------------------


def sent_and_planned(rank: int, case: Case, dtype: torch.dtype) -> tuple[list[Sent], list[Sent]]:
    whole = Whole.of(case, dtype)
    with counted(sums=len(whole.learned)) as sent:
        shares_of_ulysses(rank, case, whole)
    return sent, planned(case, rank, whole.q_BLNH.element_size())


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", WIRED)
def test_two_collectives_each_way_and_no_padding(rank_pool: RankPool, name: str, dtype: torch.dtype) -> None:
    """Invariant 8: each query token-head, each key/value token-head for each other rank that needs it, each output,
    once."""
    case = WIRED[name]
    for sent, wanted in rank_pool.run(sent_and_planned, case.ranks, case, dtype):
        assert sent == wanted


def test_the_bytes_of_the_shape_table(rank_pool: RankPool) -> None:
    """B 2, L 5 = 3 + 2, 4 over 2 heads, widths 6 and 4: what rank 0 hands rank 1, in float64, by hand."""
    (sent, _), _ = rank_pool.run(sent_and_planned, 2, WIRED["the shape table"], torch.float64)
    q, k, v, out = 3 * 2 * 2 * 6, 3 * 2 * 1 * 6, 3 * 2 * 1 * 4, 2 * 2 * 2 * 4
    assert [sent[0].to[1], sent[1].to[1]] == [8 * (16 + q + k + v), 8 * (8 + out)]
