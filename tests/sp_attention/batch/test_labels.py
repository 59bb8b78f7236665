"""shift_labels against loops over single places."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from sp_attention import shift_labels
from tests.support.attention.batches import NONE, tokens


def targets_by_loops(label_BL: list[list[int]], document_BL: list[list[int]]) -> list[list[int]]:
    """The next label where the next token is in the same document; -1 is padding."""
    return [
        [
            labels[i + 1] if i + 1 < len(labels) and documents[i] == documents[i + 1] >= 0 else NONE
            for i in range(len(labels))
        ]
        for labels, documents in zip(label_BL, document_BL, strict=True)
    ]


def test_each_token_predicts_the_next_and_the_last_nothing() -> None:
    assert shift_labels(tokens(2, 4)).tolist() == [[1, 2, 3, NONE], [101, 102, 103, NONE]]


def test_labels_do_not_cross_documents() -> None:  # B10
    target_BL = shift_labels(torch.arange(8)[None], cu_seqlens=torch.tensor([0, 4, 8]))
    assert target_BL.tolist() == [[1, 2, 3, NONE, 5, 6, 7, NONE]]


def test_padding_is_neither_a_target_nor_has_one() -> None:  # B22: 7 tokens in 8 slots
    target_BL = shift_labels(torch.arange(8)[None], attention_mask=torch.tensor([[1] * 7 + [0]]))
    assert target_BL.tolist() == [[1, 2, 3, 4, 5, 6, NONE, NONE]]


def test_documents_of_0_and_1_tokens_and_padding_between() -> None:
    target_BL = shift_labels(
        torch.arange(12)[None],
        cu_seqlens=torch.tensor([0, 3, 3, 4, 6]),
        cu_seqlens_padded=torch.tensor([1, 5, 5, 7, 10]),
    )
    documents = [[-1, 0, 0, 0, -1, 2, -1, 3, 3, -1, -1, -1]]
    assert target_BL.tolist() == targets_by_loops([list(range(12))], documents)
    assert target_BL.tolist() == [[NONE, 2, 3, NONE, NONE, NONE, NONE, 8, NONE, NONE, NONE, NONE]]


def test_left_padding_holes_and_labels_to_ignore() -> None:
    label_BL = torch.tensor([[7, 8, 9, NONE, 5, 6], [1, 2, 3, 4, 5, 6]])
    mask_BL = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]])
    target_BL = shift_labels(label_BL, attention_mask=mask_BL)
    assert target_BL.tolist() == [[NONE, NONE, NONE, 5, 6, NONE], [2, NONE, NONE, 5, 6, NONE]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_targets_are_int64_whatever_the_labels_are(dtype: torch.dtype) -> None:
    target_BL = shift_labels(tokens(1, 4).to(dtype), cu_seqlens=torch.tensor([0, 2, 4]), ignore_index=-7)
    assert target_BL.dtype == torch.int64
    assert target_BL.tolist() == [[1, -7, 3, -7]]


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (2, 1)])
def test_nothing_to_shift(shape: tuple[int, int]) -> None:
    assert shift_labels(torch.zeros(shape, dtype=torch.int64)).tolist() == torch.full(shape, NONE).tolist()


def test_the_labels_are_left_as_they_are() -> None:
    label_BL = tokens(2, 4)
    shift_labels(label_BL)
    assert torch.equal(label_BL, tokens(2, 4))


@pytest.mark.parametrize(
    ("label", "options", "text"),
    [
        (torch.zeros(4, dtype=torch.int64), {}, "labels are (4,) of torch.int64; they have to be (B, L) ints"),
        (torch.zeros(2, 4), {}, "labels are (2, 4) of torch.float32; they have to be (B, L) ints"),
        (
            tokens(1, 4),
            {"cu_seqlens_padded": torch.tensor([0, 4])},
            "cu_seqlens_padded without cu_seqlens; pass both",
        ),
        (tokens(1, 4), {"cu_seqlens": torch.tensor([0, 5])}, "documents end at 5 of a packed sequence of 4 tokens"),
        (tokens(2, 4), {"cu_seqlens": torch.tensor([0, 4])}, "documents in a batch of 2 with 4 queries"),
        (
            tokens(1, 4),
            {"cu_seqlens": torch.tensor([0.0, 4.0])},
            "cu_seqlens is (2,) of torch.float32; it has to be a tensor (documents + 1,) of ints",
        ),
        (
            tokens(1, 4),
            {"cu_seqlens": torch.tensor([0, 4]), "cu_seqlens_padded": torch.tensor([[0, 4]])},
            "cu_seqlens_padded is (1, 2) of torch.int64; it has to be a tensor (documents + 1,) of ints",
        ),
    ],
)
def test_labels_that_cannot_be(label: Tensor, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        shift_labels(label, **options)
