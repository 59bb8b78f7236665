"""Consecutive things in pieces: sizes, offsets and owners agree with cutting a list, and bad sizes are refused."""

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_dispatch import Partition
from tests.support.dispatch.layouts import compositions
from tests.support.ranks import refusal

CASES = [sizes for ranks in range(1, 5) for total in range(10) for sizes in compositions(total, ranks)]


def test_pieces_agree_with_cutting_a_range() -> None:
    for sizes in CASES:
        partition = Partition(sizes)
        total = sum(sizes)
        pieces = torch.arange(total).split(sizes)
        assert (partition.sizes, partition.total, len(partition)) == (sizes, total, len(pieces)), sizes
        for piece, offset, rank in zip(pieces, partition.offsets, range(len(sizes)), strict=True):
            assert piece.tolist() == list(range(total))[offset : offset + sizes[rank]], (sizes, rank)
            assert (partition.owner(piece) == rank).all(), (sizes, rank)


def test_owner_keeps_the_shape_and_is_int64() -> None:
    rank_AB = Partition((1, 0, 2)).owner(torch.tensor([[0, 1], [2, 0]]))
    assert rank_AB.equal(torch.tensor([[0, 2], [2, 0]]))
    assert rank_AB.dtype == torch.int64


def test_offsets_and_owner_have_no_32_bit_limit() -> None:
    partition = Partition((2**40, 0, 2**41, 5))
    assert partition.offsets == (0, 2**40, 2**40, 2**40 + 2**41)
    assert partition.total == 2**40 + 2**41 + 5
    index_N = torch.tensor([0, 2**40 - 1, 2**40, 3 * 2**40 - 1, 3 * 2**40, 3 * 2**40 + 4])
    assert partition.owner(index_N).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("ranks", range(1, 8))
def test_constructors_cut_as_torch_does(ranks: int) -> None:
    for total in range(30):
        things_N = torch.arange(total)
        assert Partition.balanced(total, ranks).sizes == tuple(map(len, things_N.tensor_split(ranks))), total
        chunks = [len(chunk) for chunk in things_N.chunk(ranks)] if total else []
        assert Partition.chunked(total, ranks).sizes == (*chunks, *[0] * (ranks - len(chunks))), total
        if total % ranks == 0:
            assert Partition.even(total, ranks).sizes == tuple(map(len, things_N.tensor_split(ranks))), total


def test_a_partition_is_a_value() -> None:
    first, second = Partition([2, 0, 3]), Partition(size for size in (2, 0, 3))
    assert first == second
    assert len({first, second, Partition((2, 3))}) == 2
    assert pickle.loads(pickle.dumps(first)) == first
    assert str(first) == "Partition(sizes=(2, 0, 3))"
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.sizes = (1,)  # type: ignore[misc]


def test_a_remainder_is_refused() -> None:
    assert refusal(lambda: Partition.even(30, 4)) == (
        "30 things do not split evenly over 4 ranks; use Partition.balanced(30, 4) for pieces that differ by one"
    )


def test_no_pieces_are_refused() -> None:
    assert refusal(lambda: Partition(())) == (
        "a Partition without pieces; it needs one size per rank, e.g. Partition((4,)) for one rank"
    )


@pytest.mark.parametrize(("size", "shown"), [(-1, "-1"), (2.0, "2.0"), (True, "True"), (None, "None"), ("3", "'3'")])
def test_sizes_that_are_no_counts_are_refused(size: Any, shown: str) -> None:
    assert refusal(lambda: Partition((4, size))) == (
        f"size 1 of Partition((4, {shown})) is {shown}; it has to be an int of at least 0"
    )


@pytest.mark.parametrize("make", [Partition.even, Partition.balanced, Partition.chunked])
def test_totals_and_ranks_that_are_no_counts_are_refused(make: Callable[[Any, Any], Partition]) -> None:
    assert refusal(lambda: make(-1, 2)) == "total is -1; it has to be an int of at least 0"
    assert refusal(lambda: make(4.0, 2)) == "total is 4.0; it has to be an int of at least 0"
    assert refusal(lambda: make(4, 0)) == "ranks is 0; it has to be an int of at least 1"
    assert refusal(lambda: make(4, True)) == "ranks is True; it has to be an int of at least 1"
