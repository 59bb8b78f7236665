"""shard_batch: everything about a token goes with it.

Payloads encode (row, place), so that a misplaced token names itself.
"""

from typing import Any

import pytest
import torch

from moe_dispatch.testing import RankThreads
from sp_attention import Batch, shift_labels
from sp_attention.batch.shard import cut
from tests.support.attention.batches import (
    NONE,
    ORDERS,
    REAL_BL,
    Order,
    added,
    pairs,
    sharded,
    sharding_of,
    tokens,
    whole_of,
)
from tests.support.tensors import scattered

CUTS = [((6,), 2), ((3, 3), 2), ((3, 0, 4), 3), ((1, 5, 1), 2), ((0, 1), 3), ((0, 0), 2), ((2, 1, 0, 4), 1)]
CUTS += [(scattered(5, 16), 2), (scattered(9, 64), 3)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("seq", "rows"), CUTS)
def test_everything_about_a_token_goes_with_it(
    seq: tuple[int, ...], rows: int, order: Order, rank_threads: RankThreads
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
    parts = rank_threads.run(sharded, len(seq), batch, sharding)
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
def test_default_positions_are_places_in_the_sequence(order: Order, rank_threads: RankThreads) -> None:
    sharding = sharding_of(2, (3, 0, 4), order)
    parts = rank_threads.run(sharded, 3, Batch(token_BL=tokens(2, 7)), sharding)
    position_BL = whole_of([part.position_Bl for part in parts], sharding)
    assert torch.equal(position_BL, torch.arange(7).expand(2, 7))
    target_BL = whole_of([part.target_Bl for part in parts], sharding)
    assert torch.equal(target_BL, shift_labels(tokens(2, 7)))
    assert bool(parts[0].real_Bl.all())
    assert parts[2].attention == {"sharding": sharding}


@pytest.mark.parametrize("order", ORDERS)
def test_default_positions_restart_in_each_document(order: Order, rank_threads: RankThreads) -> None:
    sharding = sharding_of(1, (4, 6), order)
    documents: dict[str, Any] = {
        "cu_seqlens": torch.tensor([0, 3, 5, 6]),
        "cu_seqlens_padded": torch.tensor([0, 4, 7, 9]),
    }
    parts = rank_threads.run(sharded, 2, Batch(token_BL=tokens(1, 10), **documents), sharding)
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


def test_masks_stay_whole_and_come_as_arguments(rank_threads: RankThreads) -> None:
    sharding = sharding_of(3, (1, 3))
    for mask, name, wanted in (
        (REAL_BL.int(), "key_padding_mask", REAL_BL),
        (added(pairs()), "attn_mask", added(pairs())),
    ):
        for part in rank_threads.run(sharded, 2, Batch(token_BL=tokens(3, 4), attention_mask=mask), sharding):
            assert set(part.attention) == {"sharding", name}
            assert torch.equal(part.attention[name], wanted)


def test_a_shard_of_the_batch_is_a_view() -> None:
    """Of one process: nothing is copied but what changes."""
    token_BL = tokens(2, 6)
    assert cut(token_BL, sharding_of(2, (2, 4), "LB"), 1).data_ptr() == token_BL[:, 2:].data_ptr()
