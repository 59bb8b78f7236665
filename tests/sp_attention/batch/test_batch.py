"""shard_batch, shift_labels, chunks, gather_outputs and the losses: what a model needs around the attention.

Oracles are loops over single places. Payloads encode (row, place), so that a misplaced token names itself.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from moe_dispatch.testing.counting import counting
from sp_attention import (
    Batch,
    Chunk,
    ShardedBatch,
    gather_outputs,
    shard_batch,
    shift_labels,
)
from sp_attention.batch.labels import Masks
from sp_attention.batch.shard import cut, fingerprint, shortened

Order = Literal["BL", "LB"]
ORDERS: tuple[Order, ...] = ("BL", "LB")
NONE = -100


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def tokens(batch: int, length: int) -> Tensor:
    """(B, L): row b, place l is 100 b + l."""
    return 100 * torch.arange(batch)[:, None] + torch.arange(length)


def sharding_of(batch: int, seq: tuple[int, ...], order: Order = "BL") -> TokenSharding:
    return TokenSharding(batch=batch, seq=Partition(seq), order=order)


def targets_by_loops(label_BL: list[list[int]], document_BL: list[list[int]]) -> list[list[int]]:
    """The next label where the next token is in the same document; -1 is padding."""
    return [
        [
            labels[i + 1] if i + 1 < len(labels) and documents[i] == documents[i + 1] >= 0 else NONE
            for i in range(len(labels))
        ]
        for labels, documents in zip(label_BL, document_BL, strict=True)
    ]


# ---- shift_labels ----------------------------------------------------------------------------------


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
        (tokens(1, 4), {"cu_seqlens_padded": torch.tensor([0, 4])}, "cu_seqlens_padded without cu_seqlens; the real"),
        (tokens(1, 4), {"cu_seqlens": torch.tensor([0, 5])}, "documents end at 5 of a packed sequence of 4 tokens"),
        (tokens(2, 4), {"cu_seqlens": torch.tensor([0, 4])}, "documents in a batch of 2 with 4 queries"),
        (
            tokens(1, 4),
            {"cu_seqlens": torch.tensor([0.0, 4.0])},
            "cu_seqlens are (2,) of torch.float32; they have to",
        ),
        (
            tokens(1, 4),
            {"cu_seqlens": torch.tensor([0, 4]), "cu_seqlens_padded": torch.tensor([[0, 4]])},
            "cu_seqlens are (1, 2) of torch.int64; they have to be (documents + 1,) ints",
        ),
    ],
)
def test_labels_that_cannot_be(label: Tensor, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        shift_labels(label, **options)


# ---- masks -----------------------------------------------------------------------------------------

REAL_BL = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]]).bool()


def added(mask: Tensor, lowest: float = -math.inf, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, lowest)


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
    masks = Masks.of(PADDING_FORMS[form], (3, 4))
    assert masks.attn_mask is None
    assert masks.key_padding_mask is not None
    assert masks.real_BL is not None
    assert masks.key_padding_mask.dtype == torch.bool
    assert torch.equal(masks.key_padding_mask, REAL_BL)
    assert torch.equal(masks.real_BL, REAL_BL)


def test_a_mask_for_all_rows_is_every_rows_mask() -> None:
    masks = Masks.of(REAL_BL[:1, None, None], (3, 4))
    assert masks.key_padding_mask is not None
    assert torch.equal(masks.key_padding_mask, REAL_BL[:1].expand(3, 4))


def test_a_mask_of_ones_is_no_mask() -> None:
    masks = Masks.of(torch.ones(3, 4, dtype=torch.int64), (3, 4))
    assert (masks.key_padding_mask, masks.attn_mask) == (None, None)
    assert masks.real_BL is not None
    assert bool(masks.real_BL.all())


def pairs() -> Tensor:
    """(B, 1, L, L): causal, real queries and keys only."""
    return (torch.ones(4, 4).tril().bool() & REAL_BL[:, None] & REAL_BL[:, :, None])[:, None]


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min])
def test_a_mask_of_pairs_is_kept_and_what_it_closes_is_closed(lowest: float) -> None:
    masks = Masks.of(added(pairs(), lowest), (3, 4))
    assert masks.key_padding_mask is None
    assert masks.attn_mask is not None
    assert masks.real_BL is not None
    assert torch.equal(masks.attn_mask, added(pairs()))
    assert torch.equal(masks.real_BL, REAL_BL)


def test_a_bool_or_int_mask_of_pairs_is_bool() -> None:
    for mask in (pairs(), pairs().int()):
        masks = Masks.of(mask, (3, 4))
        assert masks.attn_mask is not None
        assert masks.attn_mask.dtype == torch.bool
        assert torch.equal(masks.attn_mask, pairs())


@pytest.mark.parametrize("shape", [(3, 4), (3, 1, 1, 4)])
def test_a_bias_on_keys_is_not_taken_for_padding(shape: tuple[int, ...]) -> None:
    bias = added(REAL_BL) + torch.linspace(-1, 1, 4)
    masks = Masks.of(bias.view(shape), (3, 4))
    assert masks.key_padding_mask is None
    assert masks.attn_mask is not None
    assert torch.equal(masks.attn_mask, bias[:, None, None])
    assert masks.real_BL is not None
    assert torch.equal(masks.real_BL, REAL_BL)


@pytest.mark.parametrize("shape", [(3, 4), (3, 1, 1, 4)])
def test_a_mask_that_is_learned_is_kept_though_it_holds_zeros(shape: tuple[int, ...]) -> None:
    mask = torch.zeros(shape, requires_grad=True)
    masks = Masks.of(mask, (3, 4))
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
        Masks.of(mask, (3, 4))


# ---- shard_batch -----------------------------------------------------------------------------------

CUTS = [((6,), 2), ((3, 3), 2), ((3, 0, 4), 3), ((1, 5, 1), 2), ((0, 1), 3), ((0, 0), 2), ((2, 1, 0, 4), 1)]


def sharded(rank: int, batch: Batch, sharding: TokenSharding) -> ShardedBatch:
    part = shard_batch(batch, sharding=sharding, group=world())
    assert part.rank == rank
    assert part.sharding == sharding
    return part


def whole_of(shards: list[Tensor], sharding: TokenSharding) -> Tensor:
    """The whole (..., B, L) from every rank's (..., B, l) or (..., l, B), by slices."""
    along = -1 if sharding.order == "BL" else -2
    whole = torch.cat(shards, dim=along)
    return whole if sharding.order == "BL" else whole.transpose(-1, -2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("seq", "rows"), CUTS)
def test_everything_about_a_token_goes_with_it(
    seq: tuple[int, ...], rows: int, order: Order, rank_pool: RankPool
) -> None:
    length = sum(seq)
    token_BL = tokens(rows, length)
    position_3BL = torch.stack([token_BL + 1000 * axis for axis in range(3)])
    batch = Batch(
        token_BL=token_BL,
        target_BL=token_BL + 7,
        loss_mask_BL=(token_BL % 3 > 0).float(),
        position_BL=position_3BL,
        attention_mask=(token_BL % 5 < 4).long(),
    )
    sharding = sharding_of(rows, seq, order)
    parts = rank_pool.run(sharded, len(seq), batch, sharding)
    for rank, part in enumerate(parts):
        shape = sharding.local_shape(rank)
        assert part.token_Bl.shape == part.target_Bl.shape == part.real_Bl.shape == shape
        assert part.position_Bl.shape == (3, *shape)
    assert torch.equal(whole_of([part.token_Bl for part in parts], sharding), token_BL)
    assert torch.equal(whole_of([part.position_Bl for part in parts], sharding), position_3BL)  # B23
    real_BL, counts_BL = token_BL % 5 < 4, (token_BL % 5 < 4) & (token_BL % 3 > 0)
    assert torch.equal(whole_of([part.real_Bl for part in parts], sharding), real_BL)
    assert torch.equal(whole_of([part.loss_mask_Bl for part in parts], sharding), counts_BL)
    target_BL = whole_of([part.target_Bl for part in parts], sharding)
    assert torch.equal(target_BL, torch.where(counts_BL, token_BL + 7, NONE))


def test_one_rank_alone_knows_which_rows_it_holds() -> None:
    """The order of a sequence-first part: places outside, rows inside."""
    sharding = sharding_of(2, (3, 2), "LB")
    assert sharding.local_shape(1) == (2, 2)
    assert cut(tokens(2, 5), sharding, 1).tolist() == [[3, 103], [4, 104]]
    assert cut(tokens(2, 5).expand(3, 2, 5), sharding, 1)[2].tolist() == [[3, 103], [4, 104]]
    assert cut(tokens(2, 5), sharding_of(2, (3, 2)), 1).tolist() == [[3, 4], [103, 104]]


@pytest.mark.parametrize("order", ORDERS)
def test_default_positions_are_places_in_the_sequence(order: Order, rank_pool: RankPool) -> None:
    sharding = sharding_of(2, (3, 0, 4), order)
    parts = rank_pool.run(sharded, 3, Batch(token_BL=tokens(2, 7)), sharding)
    position_BL = whole_of([part.position_Bl for part in parts], sharding)
    assert torch.equal(position_BL, torch.arange(7).expand(2, 7))
    target_BL = whole_of([part.target_Bl for part in parts], sharding)
    assert torch.equal(target_BL, shift_labels(tokens(2, 7)))
    assert bool(parts[0].real_Bl.all())
    assert parts[2].attention == {"sharding": sharding}


@pytest.mark.parametrize("order", ORDERS)
def test_default_positions_restart_in_each_document(order: Order, rank_pool: RankPool) -> None:
    sharding = sharding_of(1, (4, 6), order)
    documents: dict[str, Any] = {
        "cu_seqlens": torch.tensor([0, 3, 5, 6]),
        "cu_seqlens_padded": torch.tensor([0, 4, 7, 9]),
    }
    parts = rank_pool.run(sharded, 2, Batch(token_BL=tokens(1, 10), **documents), sharding)
    position_BL = whole_of([part.position_Bl for part in parts], sharding)
    assert position_BL.tolist() == [[0, 1, 2, 0, 0, 1, 0, 0, 0, 0]]
    real_BL = whole_of([part.real_Bl for part in parts], sharding)
    assert real_BL.int().tolist() == [[1, 1, 1, 0, 1, 1, 0, 1, 0, 0]]
    target_BL = whole_of([part.target_Bl for part in parts], sharding)
    assert target_BL.tolist() == [[1, 2, NONE, NONE, 5, NONE, NONE, NONE, NONE, NONE]]
    for part in parts:
        assert {name: x.tolist() for name, x in part.attention.items() if name != "sharding"} == {
            name: x.tolist() for name, x in documents.items()
        }


def test_masks_stay_whole_and_come_as_arguments(rank_pool: RankPool) -> None:
    sharding = sharding_of(3, (1, 3))
    for mask, name, wanted in (
        (REAL_BL.int(), "key_padding_mask", REAL_BL),
        (added(pairs()), "attn_mask", added(pairs())),
    ):
        for part in rank_pool.run(sharded, 2, Batch(token_BL=tokens(3, 4), attention_mask=mask), sharding):
            assert set(part.attention) == {"sharding", name}
            assert torch.equal(part.attention[name], wanted)


def test_a_shard_of_the_batch_is_a_view() -> None:
    """Of one process: nothing is copied but what changes."""
    token_BL = tokens(2, 6)
    assert cut(token_BL, sharding_of(2, (2, 4), "LB"), 1).data_ptr() == token_BL[:, 2:].data_ptr()


# ---- agreement -------------------------------------------------------------------------------------

GOOD = Batch(token_BL=tokens(2, 5))


def refusal(rank: int, batches: dict[int, Batch], shardings: dict[int, TokenSharding]) -> tuple[str, int]:
    """What shard_batch says on this rank, and whether the group still works afterwards."""
    text = "no error"
    try:
        shard_batch(batches.get(rank, GOOD), sharding=shardings.get(rank, sharding_of(2, (2, 1, 2))), group=world())
    except ValueError as error:
        text = str(error)
    count = torch.ones(())
    dist.all_reduce(count)
    return text, int(count)


def refusals(
    pool: RankPool, batches: dict[int, Batch] | None = None, shardings: dict[int, TokenSharding] | None = None
) -> str:
    """The one text that every rank raises."""
    answers = pool.run(refusal, 3, batches or {}, shardings or {}, timeout=30)
    assert {count for _, count in answers} == {3}
    assert len({text for text, _ in answers}) == 1
    return answers[0][0]


def test_ranks_that_agree_are_not_refused(rank_pool: RankPool) -> None:
    assert refusals(rank_pool) == "no error"


@pytest.mark.parametrize(
    ("sharding", "told"),
    [
        (sharding_of(2, (1, 2, 2)), "seq (1, 2, 2)"),
        (sharding_of(2, (2, 1, 2), "LB"), "order 'LB'"),
        (sharding_of(2, (2, 1, 2)).select((0, 2, 1)), "ranks (0, 2, 1)"),
    ],
)
def test_shardings_that_differ_are_everyones_error(sharding: TokenSharding, told: str, rank_pool: RankPool) -> None:
    text = refusals(rank_pool, shardings={1: sharding})
    assert text.startswith("the ranks disagree about one call (ranks [0, 2]: sharding batch (2,), seq (2, 1, 2), ")
    assert "rank [1]: sharding" in text
    assert told in text
    assert text.endswith("every rank of the group has to pass the same values")


SMALL = torch.tensor([0, 2, 5])
DIFFERENT = {
    "tokens": Batch(token_BL=tokens(2, 5).flip(0), target_BL=shift_labels(tokens(2, 5))),
    "targets": Batch(token_BL=tokens(2, 5), target_BL=tokens(2, 5)),
    "ignored": Batch(token_BL=tokens(2, 5), ignore_index=-1),
    "positions": Batch(token_BL=tokens(2, 5), position_BL=tokens(2, 5)),
    "padding": Batch(token_BL=tokens(2, 5), target_BL=shift_labels(tokens(2, 5)), attention_mask=tokens(2, 5) != 104),
    "mask": Batch(token_BL=tokens(2, 5), attention_mask=torch.ones(1, 1, 5, 5).bool()),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_batches_that_differ_are_everyones_error(name: str, rank_pool: RankPool) -> None:
    text = refusals(rank_pool, batches={2: DIFFERENT[name]})
    assert text.startswith("the ranks disagree about one call (ranks [0, 1]: sharding batch (2,)")
    assert "rank [2]: sharding" in text


def test_documents_that_differ_are_everyones_error(rank_pool: RankPool) -> None:
    one = sharding_of(1, (2, 1, 2))
    batches = {
        rank: Batch(
            token_BL=tokens(1, 5),
            target_BL=torch.full((1, 5), NONE),
            position_BL=tokens(1, 5),
            cu_seqlens=torch.tensor(ends),
        )
        for rank, ends in enumerate([[0, 2, 5], [0, 3, 5], [0, 2, 5]])
    }
    text = refusals(rank_pool, batches, dict.fromkeys(range(3), one))
    assert "ranks [0, 2]: sharding" in text
    assert "documents (0, 2, 5) at (0, 2, 5); rank [1]: sharding" in text
    assert "documents (0, 3, 5) at (0, 3, 5))" in text


FIELD = "it has to be (B, L) = (2, 5), batch first for either order"
WRONG = {
    "rank 1: token_BL is (5, 2); " + FIELD: replace(GOOD, token_BL=tokens(5, 2)),
    "rank 1: token_BL is (2, 2); " + FIELD: replace(GOOD, token_BL=tokens(2, 2)),
    "rank 1: token_BL is torch.float32; it has to be ints": replace(GOOD, token_BL=torch.zeros(2, 5)),
    "rank 1: target_BL is (2, 4); " + FIELD: replace(GOOD, target_BL=tokens(2, 4)),
    "rank 1: target_BL is (3, 2, 5); " + FIELD: replace(GOOD, target_BL=tokens(2, 5).expand(3, 2, 5)),
    "rank 1: loss_mask_BL is (5,); " + FIELD: replace(GOOD, loss_mask_BL=torch.ones(5)),
    "rank 1: loss_mask_BL holds more than 0 and 1; weigh losses per token and pass them to mean_loss": replace(
        GOOD, loss_mask_BL=torch.full((2, 5), 0.5)
    ),
    "rank 1: position_BL is (2, 5, 3); " + FIELD + ", or that after a first dimension": replace(
        GOOD, position_BL=torch.zeros(2, 5, 3, dtype=torch.int64)
    ),
    "rank 1: position_BL is torch.float32; it has to be ints": replace(GOOD, position_BL=torch.zeros(3, 2, 5)),
    "rank 1: attention_mask is (2, 2); it has to be one of (2, 5), (2, 1, 1, 5), (2, 1, 5, 5): the whole sequence, "
    "on every rank": replace(GOOD, attention_mask=torch.ones(2, 2).bool()),
    "rank 1: documents in a batch of 2 with 5 queries and 5 keys; pack them into one row (B = 1) of self-attention, "
    "or use key_padding_mask": replace(GOOD, cu_seqlens=SMALL),
    "rank 1: cu_seqlens_padded without cu_seqlens; the real lengths have to be given too": replace(
        GOOD, cu_seqlens_padded=SMALL
    ),
    "rank 1: token_BL is list; it has to be a tensor": replace(GOOD, token_BL=tokens(2, 5).tolist()),  # type: ignore[arg-type]
    "rank 1: token_BL is NoneType; it has to be a tensor": Batch(token_BL=None),  # type: ignore[arg-type]
    "rank 1: target_BL is list; it has to be a tensor": replace(GOOD, target_BL=[[0] * 5] * 2),  # type: ignore[arg-type]
    "rank 1: position_BL is list; it has to be a tensor": replace(GOOD, position_BL=[[0] * 5] * 2),  # type: ignore[arg-type]
    "rank 1: attention_mask is list; it has to be a tensor": replace(GOOD, attention_mask=[[1] * 5] * 2),  # type: ignore[arg-type]
    "rank 1: cu_seqlens is list; it has to be a tensor": replace(GOOD, cu_seqlens=[0, 2, 5]),  # type: ignore[arg-type]
    "rank 1: cu_seqlens_padded is tuple; it has to be a tensor": replace(
        GOOD,
        cu_seqlens=SMALL,
        cu_seqlens_padded=(0, 2, 5),  # type: ignore[arg-type]
    ),
    "rank 1: ignore_index is None; it has to be an int": replace(GOOD, ignore_index=None),  # type: ignore[arg-type]
    "rank 1: batch is dict; it has to be a Batch": {"token_BL": tokens(2, 5)},  # type: ignore[dict-item]
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_on_one_rank_is_everyones_error(text: str, rank_pool: RankPool) -> None:
    assert refusals(rank_pool, batches={1: WRONG[text]}) == text


def test_no_sharding_on_one_rank_is_everyones_error(rank_pool: RankPool) -> None:
    text = refusals(rank_pool, shardings={2: None})  # type: ignore[dict-item]
    assert text == "rank 2: sharding is NoneType; it has to be a TokenSharding"


def unforeseen(rank: int) -> tuple[str, str]:
    """What is told, and what it comes from, where rank 1 runs into an error of torch's."""
    batch = replace(GOOD, attention_mask=torch.ones(2, 5, device="meta").bool()) if rank == 1 else GOOD
    with pytest.raises(ValueError, match="rank 1: shard_batch raised") as error:
        shard_batch(batch, sharding=sharding_of(2, (2, 1, 2)), group=world())
    return str(error.value), type(error.value.__cause__).__name__


def test_an_error_that_nobody_foresaw_is_everyones_too(rank_pool: RankPool) -> None:
    texts, causes = zip(*rank_pool.run(unforeseen, 3, timeout=20), strict=True)
    assert len(set(texts)) == 1
    assert texts[0].startswith(f"rank 1: shard_batch raised {causes[1]}: ")
    assert causes[::2] == ("NoneType", "NoneType")


def test_another_index_to_ignore_is_everyones_error(rank_pool: RankPool) -> None:
    """Though no target is ignored here."""
    batch = replace(GOOD, target_BL=tokens(2, 5))
    text = refusals(rank_pool, batches={0: batch, 1: batch, 2: replace(batch, ignore_index=-1)})
    ours, theirs = text.split("; rank [2]: ")
    assert "; ignore_index -100;" in ours
    assert "; ignore_index -1;" in theirs


def test_a_sharding_of_another_size_on_one_rank_is_everyones_error(rank_pool: RankPool) -> None:
    text = refusals(rank_pool, shardings={2: sharding_of(2, (2, 3))})
    assert text.startswith("rank 2: the token sharding describes 2 ranks, but the group has 3; they have to be equal")


def test_a_batch_that_is_cut_is_refused(rank_pool: RankPool) -> None:
    rows_cut = TokenSharding(batch=Partition((1, 1, 0)), seq=5)
    text = refusals(rank_pool, shardings=dict.fromkeys(range(3), rows_cut))
    for rank in range(3):
        assert (
            f"rank {rank}: the batch is cut into (1, 1, 0), but masks and documents are those of whole rows" in text
        )


def test_a_sharding_that_leaves_tokens_out_is_refused(rank_pool: RankPool) -> None:
    part = sharding_of(2, (2, 1, 1, 1)).select((0, 1, 2))
    text = refusals(rank_pool, shardings=dict.fromkeys(range(3), part))
    assert "rank 0: shard_batch needs every token of the grid, but the ranks of this sharding hold 8 of 10" in text


def test_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match="group is None; pass the process group explicitly"):
        shard_batch(GOOD, sharding=sharding_of(2, (5,)), group=None)  # type: ignore[arg-type]


def exchanges(rank: int, length: int) -> tuple[list[str], int]:
    """The collectives of one shard_batch, and their bytes."""
    with counting() as counts:
        mask = torch.ones(2, 1, length, length).tril().bool()
        batch = Batch(token_BL=tokens(2, length), attention_mask=mask, position_BL=tokens(2, length).expand(3, 2, -1))
        shard_batch(batch, sharding=sharding_of(2, (length, 0, 0)), group=world())
    return counts.collectives, counts.wire_bytes


@pytest.mark.parametrize("length", [1, 40])
def test_ranks_trade_one_word_each(length: int, rank_pool: RankPool) -> None:
    assert rank_pool.run(exchanges, 3, length) == [(["c10d::alltoall_base_"], 2 * 8)] * 3


def test_fingerprints_see_values_places_and_shapes() -> None:
    x = torch.arange(6)
    prints = [fingerprint(y) for y in (x, x.flip(0), x.view(2, 3), x + 1, x * 0, x * 0 + 1, x.bool())]
    assert len(set(prints)) == len(prints)
    assert fingerprint(x.int()) == fingerprint(x)


def test_long_facts_are_shortened_to_what_still_differs() -> None:
    texts = ["x" * 500, "x" * 499 + "y", "x" * 100]
    assert [len(shortened(text)) for text in texts] == [100, 100, 100]
    assert len({shortened(text) for text in texts}) == 3


# ---- chunks ----------------------------------------------------------------------------------------


def chunks_of(rank: int, batch: Batch, sharding: TokenSharding, size: int) -> list[Chunk]:
    return list(shard_batch(batch, sharding=sharding, group=world()).chunks(size))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seq", [(7, 6, 5), (3, 0, 8), (1, 0, 0), (0, 0, 0), (9, 9, 9)])
@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_chunks_keep_everything_together(seq: tuple[int, ...], size: int, order: Order, rank_pool: RankPool) -> None:
    length = sum(seq)
    token_BL = tokens(2, length)
    mask = (torch.arange(2 * length * length).view(2, 1, length, length) % 7) + 0.5
    batch = Batch(
        token_BL=token_BL,
        target_BL=token_BL + 7,
        loss_mask_BL=token_BL % 3 > 0,
        position_BL=torch.stack([token_BL + 1000 * axis for axis in range(3)]),
        attention_mask=mask,
    )
    sharding = sharding_of(2, seq, order)
    per_rank = rank_pool.run(chunks_of, 3, batch, sharding, size)
    along = -1 if order == "BL" else -2
    pieces = max(math.ceil(max(seq) / size), 1)
    assert {len(chunks) for chunks in per_rank} == {pieces}  # as many on every rank: a collective in each is safe
    places: list[int] = []
    for rank, chunks in enumerate(per_rank):
        for chunk in chunks:
            count = chunk.token_Bc.shape[along]
            assert count <= size
            assert chunk.token_Bc.shape == chunk.target_Bc.shape == chunk.real_Bc.shape == chunk.position_Bc.shape[1:]
            place_c = torch.arange(chunk.first_place, chunk.first_place + count)
            places += place_c.tolist()
            token_Bc = chunk.token_Bc if order == "BL" else chunk.token_Bc.T
            target_Bc = chunk.target_Bc if order == "BL" else chunk.target_Bc.T
            assert torch.equal(token_Bc, token_BL[:, place_c])
            assert torch.equal(target_Bc, torch.where(token_Bc % 3 > 0, token_Bc + 7, NONE))
            assert torch.equal(chunk.position_Bc, torch.stack([chunk.token_Bc + 1000 * axis for axis in range(3)]))
            if length > 1:  # one row serves any number of queries
                assert chunk.attn_mask is not None
                assert torch.equal(chunk.attn_mask, mask[:, :, place_c])
        counts = [chunk.token_Bc.shape[along] for chunk in chunks]
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == seq[rank]
    assert places == list(range(length))


def test_chunks_of_padding_and_of_a_mask_for_all_queries(rank_pool: RankPool) -> None:
    bias = torch.linspace(-1, 1, 4).expand(3, 4)
    for mask in (REAL_BL, bias[:, None, None]):
        for chunks in rank_pool.run(
            chunks_of, 2, Batch(token_BL=tokens(3, 4), attention_mask=mask), sharding_of(3, (1, 3)), 2
        ):
            for chunk in chunks:
                place_c = torch.arange(chunk.first_place, chunk.first_place + chunk.token_Bc.shape[1])
                if mask is REAL_BL:
                    assert chunk.attn_mask is None
                    assert torch.equal(chunk.real_Bc, REAL_BL[:, place_c])
                else:
                    assert chunk.attn_mask is not None
                    assert torch.equal(chunk.attn_mask, bias[:, None, None])


def one_rank(rank: int) -> str:
    part = shard_batch(GOOD, sharding=sharding_of(2, (5,)), group=world())
    try:
        list(part.chunks(0))
    except ValueError as error:
        return str(error)
    return "no error"


def test_chunks_of_nothing_are_refused(rank_pool: RankPool) -> None:
    assert rank_pool.run(one_rank, 1) == ["chunks of 0 places; size has to be at least 1"]


# ---- outputs back ----------------------------------------------------------------------------------


def gathered(rank: int, batch: Batch, sharding: TokenSharding) -> tuple[Tensor, Tensor]:
    """The whole of an output that is NaN at padding, and this rank's gradient of a weighted sum of it."""
    part = shard_batch(batch, sharding=sharding, group=world())
    x_BlD = part.token_Bl[..., None] + torch.tensor([0.0, 0.5])
    x_BlD = x_BlD.masked_fill(~part.real_Bl[..., None], math.nan).requires_grad_()
    x_BLD = gather_outputs(x_BlD, batch=part, group=world())
    weight_BLD = batch.token_BL[..., None] * torch.tensor([1.0, 2.0]) * (rank + 1)
    x_BLD.backward(weight_BLD)
    assert x_BlD.grad is not None
    return x_BLD.detach(), x_BlD.grad


@pytest.mark.parametrize("order", ORDERS)
def test_outputs_come_back_batch_first_and_0_at_padding(order: Order, rank_pool: RankPool) -> None:
    """B11: also where the sequence is the first dimension."""
    token_BL = tokens(2, 6)
    real_BL = token_BL % 4 > 0
    sharding = sharding_of(2, (2, 0, 4), order)
    wholes, grads = zip(
        *rank_pool.run(gathered, 3, Batch(token_BL=token_BL, attention_mask=real_BL), sharding), strict=True
    )
    wanted_BLD = torch.where(real_BL[..., None], token_BL[..., None] + torch.tensor([0.0, 0.5]), 0.0)
    for whole_BLD in wholes:
        assert torch.equal(whole_BLD, wanted_BLD)
    grad_2BL = whole_of([grad.movedim(-1, 0) for grad in grads], sharding)
    wanted_2BL = torch.stack([6.0 * token_BL, 12.0 * token_BL]).masked_fill(~real_BL, 0.0)
    assert torch.equal(grad_2BL, wanted_2BL)


OUTPUTS: dict[str, tuple[Callable[[Tensor], object], str, str]] = {
    "of all tokens": (
        lambda x_BlD: torch.zeros(2, 5, 3),
        "rank 1: the output is (2, 5, 3), but this rank's tokens in order 'BL' are (2, 3); pass what was computed "
        "for them",
        "",
    ),
    "a token short": (lambda x_BlD: x_BlD[:, 1:], "rank 1: the output is (2, 2, 3), but this rank's tokens", ""),
    "of another order": (lambda x_BlD: x_BlD.transpose(0, 1), "rank 1: the output is (3, 2, 3), but this rank's", ""),
    "no tensor": (lambda x_BlD: x_BlD.tolist(), "rank 1: the output is list, but this rank's tokens", ""),
    "of another width": (
        lambda x_BlD: x_BlD[..., 1:],
        "outputs (3,) of torch.float32",
        "outputs (2,) of torch.float32",
    ),
    "of another dtype": (
        lambda x_BlD: x_BlD.double(),
        "outputs (3,) of torch.float32",
        "outputs (3,) of torch.float64",
    ),
    "with a gradient": (
        lambda x_BlD: x_BlD.requires_grad_(),
        "outputs (3,) of torch.float32 without gradient",
        "outputs (3,) of torch.float32 with gradient",
    ),
}


def gather_wrong(rank: int, name: str) -> tuple[str, bool]:
    """What is told where the output of rank 1 is wrong, and whether the group works afterwards."""
    part = shard_batch(GOOD, sharding=sharding_of(2, (2, 3)), group=world())
    x_BlD = torch.ones(*part.token_Bl.shape, 3)
    wrong_BlD = OUTPUTS[name][0](x_BlD.clone()) if rank == 1 else x_BlD
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the caller compares the text)
        gather_outputs(wrong_BlD, batch=part, group=world())  # type: ignore[arg-type]
    return str(error.value), bool(gather_outputs(x_BlD, batch=part, group=world()).all())


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_wrong_output_of_one_rank_is_everyones_error(name: str, rank_pool: RankPool) -> None:
    (text, usable), other = rank_pool.run(gather_wrong, 2, name, timeout=20)
    assert other == (text, usable)
    assert usable
    assert all(words in text for words in OUTPUTS[name][1:])


def gathering(rank: int) -> tuple[list[str], list[str]]:
    part = shard_batch(GOOD, sharding=sharding_of(2, (2, 3)), group=world())
    x_BlD = torch.ones(*part.token_Bl.shape, 3, requires_grad=True)
    with counting() as forward:
        x_BLD = gather_outputs(x_BlD, batch=part, group=world())
    with counting() as backward:
        x_BLD.sum().backward()
    return forward.collectives, backward.collectives


def test_gathering_takes_a_word_and_the_rows(rank_pool: RankPool) -> None:
    one = "c10d::alltoall_base_"
    assert rank_pool.run(gathering, 2) == [([one, one], [one])] * 2
