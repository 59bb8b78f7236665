"""cu_seqlens have one reader: what a batch may hold, attention takes, and what is refused has one text."""

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from sp_attention import Batch, shard_batch, shift_labels, ulysses_attention
from sp_attention.attend.documents import Documents
from sp_attention.reference import reference_attention
from tests.support.ranks import refusal, world
from tests.support.tensors import difference, share

ENDS, STARTS, LENGTH, SEQ = [0, 3, 5], [0, 4, 7], 7, (3, 4)
DTYPES = [
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip

# cu_seqlens and cu_seqlens_padded of a row of seven tokens, and what is said of them.
WRONG: dict[str, tuple[object, object, str]] = {
    "no real lengths": (
        None,
        torch.tensor(STARTS),
        "cu_seqlens_padded without cu_seqlens; pass both, or cu_seqlens alone where nothing is padded",
    ),
    "a list": ([0, 7], None, "cu_seqlens is list; it has to be a tensor (documents + 1,) of ints"),
    "bools": (
        torch.tensor([False, True]),
        None,
        "cu_seqlens is (2,) of torch.bool; it has to be a tensor (documents + 1,) of ints",
    ),
    "two dimensions": (
        torch.tensor(ENDS),
        torch.tensor([STARTS]),
        "cu_seqlens_padded is (1, 3) of torch.int64; it has to be a tensor (documents + 1,) of ints",
    ),
    "falling": (torch.tensor([0, 5, 3, 7]), None, "cu_seqlens is [0, 5, 3, 7]; it has to start at 0 and never fall"),
}


def attended(rank: int, dtype: torch.dtype) -> float:
    """How far this rank's output of documents of a sharded batch is from the reference."""
    draw = torch.Generator().manual_seed(0)
    wholes = [torch.randn(1, LENGTH, 2, 4, generator=draw, dtype=torch.float64) for _ in "qkv"]
    ends, starts = (torch.tensor(numbers, dtype=dtype) for numbers in (ENDS, STARTS))
    sharding = TokenSharding(batch=1, seq=Partition(SEQ))
    whole = Batch(token_BL=torch.ones(1, LENGTH).long(), cu_seqlens=ends, cu_seqlens_padded=starts)
    batch = shard_batch(whole, sharding=sharding, group=world())
    out_BlNH = ulysses_attention(*(sharding.shard(x, rank) for x in wholes), group=world(), **batch.attention)
    wanted_BLNH = reference_attention(*wholes, cu_seqlens=ends, cu_seqlens_padded=starts)
    return difference(out_BlNH, share(wanted_BLNH, SEQ, "BL", rank))


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8])
def test_what_shard_batch_takes_attention_takes(rank_pool: RankPool, dtype: torch.dtype) -> None:
    assert max(rank_pool.run(attended, 2, dtype, timeout=20)) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_ints_of_any_dtype_are_the_same_documents(dtype: torch.dtype) -> None:
    ends, starts = (torch.tensor(numbers, dtype=dtype) for numbers in (ENDS, STARTS))
    documents, problem = Documents.read(ends, starts, 1, (LENGTH, LENGTH))
    assert problem == ""
    assert documents is not None
    assert documents == Documents(tuple(ENDS), tuple(STARTS), True)
    assert documents.spans == ((0, 3), (4, 6))


def test_a_sequence_that_is_not_packed_has_no_documents() -> None:
    assert Documents.read(None, None, 2, (LENGTH, 3)) == (None, "")


@pytest.mark.parametrize("name", WRONG)
def test_labels_and_attention_say_the_same(name: str) -> None:
    cu_seqlens, cu_seqlens_padded, text = WRONG[name]
    label_BL: Tensor = torch.ones(1, LENGTH).long()
    pair = {"cu_seqlens": cu_seqlens, "cu_seqlens_padded": cu_seqlens_padded}
    assert refusal(lambda: shift_labels(label_BL, **pair)) == text  # type: ignore[arg-type]
    assert Documents.read(*pair.values(), 1, (LENGTH, LENGTH))[1] == text  # type: ignore[arg-type]
