"""Documents that are wrong on one rank."""

import pytest
import torch

from moe_dispatch.testing import RankPool
from tests.support.attention.wrong_calls import Arguments, documents, right_call, told, works

ENDS = "cu_seqlens is {}; it has to start at 0 and never fall"
STARTS = (
    "cu_seqlens_padded is {} for cu_seqlens {}; it needs as many entries, each document's start, far enough apart "
)
STARTS += "for the real tokens"
PAST = (
    "documents end at {} of a packed sequence of 7 tokens; cu_seqlens has to end at the length, or pass "
    "cu_seqlens_padded to say where padding is"
)
# Wrong documents in one row of 7 tokens, on rank 1 only.
DOCUMENTS: dict[str, tuple[Arguments, str]] = {
    "not from 0": (documents([1, 7]), ENDS.format([1, 7])),
    "falling": (documents([0, 5, 3, 7]), ENDS.format([0, 5, 3, 7])),
    "no entry": ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, ENDS.format([])),
    "short of the length": (documents([0, 3, 6]), PAST.format(6)),
    "past the length": (documents([0, 3, 8]), PAST.format(8)),
    "padded: another number": (documents([0, 3, 6], [0, 3]), STARTS.format([0, 3], [0, 3, 6])),
    "padded: too near": (documents([0, 3, 6], [0, 2, 6]), STARTS.format([0, 2, 6], [0, 3, 6])),
    "padded: last one cut": (documents([0, 3, 6], [0, 3, 5]), STARTS.format([0, 3, 5], [0, 3, 6])),
    "padded: past the length": (documents([0, 3, 6], [0, 4, 8]), PAST.format(8)),
    "padded: from below 0": (documents([0, 3, 6], [-1, 3, 6]), PAST.format(6)),
}


# ---- cases: what the ranks run -------------------------------------------------------------------------


def wrong_documents_on_rank_1(rank: int, name: str) -> tuple[str, bool]:
    arguments = right_call(rank, batch=1) | (DOCUMENTS[name][0] if rank else documents([0, 3, 7]))
    return told(arguments), works(rank)


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_wrong_documents(rank_pool: RankPool, name: str) -> None:
    wanted = f"rank 1: {DOCUMENTS[name][1]}", True
    assert rank_pool.run(wrong_documents_on_rank_1, 2, name) == [wanted] * 2
