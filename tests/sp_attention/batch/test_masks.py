"""Masks of a batch: every form of padding is one mask, and a mask of pairs is kept."""

import math
import re

import pytest
import torch
from torch import Tensor

from sp_attention.batch.masks import BatchMask
from tests.support.attention.batches import REAL_BL, added, pairs

PADDING_FORMS = {
    "bool": REAL_BL,
    "int": REAL_BL.long(),
    "int32": REAL_BL.int(),
    "uint8": REAL_BL.byte(),
    "added": added(REAL_BL),
    "(B, 1, 1, L) bool": REAL_BL[:, None, None],
    "(B, 1, 1, L) int": REAL_BL[:, None, None].long(),
    "(B, 1, 1, L) added": added(REAL_BL[:, None, None]),
    "lowest of float32": added(REAL_BL[:, None, None], torch.finfo(torch.float32).min),
    "lowest of bfloat16": added(REAL_BL[:, None, None], torch.finfo(torch.bfloat16).min),
    "lowest of bfloat16 in bfloat16": added(REAL_BL, torch.finfo(torch.bfloat16).min, torch.bfloat16),
    "lowest of float16 in float16": added(REAL_BL, torch.finfo(torch.float16).min, torch.float16),
    "lowest of float64": added(REAL_BL, torch.finfo(torch.float64).min, torch.float64),
}


@pytest.mark.parametrize("form", PADDING_FORMS)
def test_every_form_of_a_padding_mask_is_the_same_mask(form: str) -> None:
    masks = BatchMask.of(PADDING_FORMS[form], (3, 4))
    assert masks.attn_mask is None
    assert masks.key_padding_mask is not None
    assert masks.real_BL is not None
    assert masks.key_padding_mask.dtype == torch.bool
    assert torch.equal(masks.key_padding_mask, REAL_BL)
    assert torch.equal(masks.real_BL, REAL_BL)


def test_a_mask_for_all_rows_is_every_rows_mask() -> None:
    masks = BatchMask.of(REAL_BL[:1, None, None], (3, 4))
    assert masks.key_padding_mask is not None
    assert torch.equal(masks.key_padding_mask, REAL_BL[:1].expand(3, 4))


def test_a_mask_of_ones_is_no_mask() -> None:
    masks = BatchMask.of(torch.ones(3, 4, dtype=torch.int64), (3, 4))
    assert (masks.key_padding_mask, masks.attn_mask) == (None, None)
    assert masks.real_BL is not None
    assert bool(masks.real_BL.all())


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min])
def test_a_mask_of_pairs_is_kept_and_what_it_closes_is_closed(lowest: float) -> None:
    masks = BatchMask.of(added(pairs(), lowest), (3, 4))
    assert masks.key_padding_mask is None
    assert masks.attn_mask is not None
    assert masks.real_BL is not None
    assert torch.equal(masks.attn_mask, added(pairs()))
    assert torch.equal(masks.real_BL, REAL_BL)


def test_a_bool_or_int_mask_of_pairs_is_bool() -> None:
    for mask in (pairs(), pairs().int()):
        masks = BatchMask.of(mask, (3, 4))
        assert masks.attn_mask is not None
        assert masks.attn_mask.dtype == torch.bool
        assert torch.equal(masks.attn_mask, pairs())


@pytest.mark.parametrize("shape", [(3, 4), (3, 1, 1, 4)])
def test_a_bias_on_keys_is_not_taken_for_padding(shape: tuple[int, ...]) -> None:
    bias = added(REAL_BL) + torch.linspace(-1, 1, 4)
    masks = BatchMask.of(bias.view(shape), (3, 4))
    assert masks.key_padding_mask is None
    assert masks.attn_mask is not None
    assert torch.equal(masks.attn_mask, bias[:, None, None])
    assert masks.real_BL is not None
    assert torch.equal(masks.real_BL, REAL_BL)


@pytest.mark.parametrize("shape", [(3, 4), (3, 1, 1, 4)])
def test_a_mask_that_is_learned_is_kept_though_it_holds_zeros(shape: tuple[int, ...]) -> None:
    mask = torch.zeros(shape, requires_grad=True)
    masks = BatchMask.of(mask, (3, 4))
    assert masks.key_padding_mask is None
    assert masks.attn_mask is not None
    masks.attn_mask.sum().backward()
    assert mask.grad is not None
    assert torch.equal(mask.grad, torch.ones(shape))


SHAPES = "it has to be one of (3, 4), (3, 1, 1, 4), (3, 1, 4, 4): the whole sequence, on every rank"


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.ones(3, 2).bool(), f"attention_mask is (3, 2); {SHAPES}"),
        (torch.ones(4, 4).bool(), f"attention_mask is (4, 4); {SHAPES}"),
        (torch.ones(2, 1, 1, 4).bool(), f"attention_mask is (2, 1, 1, 4); {SHAPES}"),
        (torch.ones(3, 1, 2, 4).bool(), f"attention_mask is (3, 1, 2, 4); {SHAPES}"),
        (torch.ones(3, 1, 4, 2).bool(), f"attention_mask is (3, 1, 4, 2); {SHAPES}"),
        (torch.ones(3, 4, 4).bool(), f"attention_mask is (3, 4, 4); {SHAPES}"),
        (2 * REAL_BL.long(), "attention_mask is ints other than 0 and 1; pass cu_seqlens for documents"),
        (REAL_BL.float(), "with 0 and 1 alone; floats are added to the products (0 attends, -inf does not), so pass"),
        (torch.full((3, 4), math.nan), "attention_mask is torch.float32 with NaN"),
    ],
)
def test_masks_that_cannot_be(mask: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        BatchMask.of(mask, (3, 4))
