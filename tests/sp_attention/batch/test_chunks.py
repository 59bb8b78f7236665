"""Chunks of a sharded batch keep everything about a token together."""

import math

import pytest
import torch

from moe_dispatch import TokenSharding
from moe_dispatch.testing import RankThreads
from sp_attention import Batch, shard_batch
from sp_attention.batch.batch import Chunk
from tests.support.attention.batches import GOOD, NONE, ORDERS, REAL_BL, Order, sharding_of, tokens
from tests.support.ranks import refusal, world


def chunks_of(rank: int, batch: Batch, sharding: TokenSharding, size: int) -> list[Chunk]:
    return list(shard_batch(batch, sharding=sharding, group=world()).chunks(size))


def one_rank(rank: int) -> str:
    part = shard_batch(GOOD, sharding=sharding_of(2, (5,)), group=world())
    return refusal(lambda: list(part.chunks(0)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seq", [(7, 6, 5), (3, 0, 8), (1, 0, 0), (0, 0, 0), (9, 9, 9)])
@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_chunks_keep_everything_together(
    seq: tuple[int, ...], size: int, order: Order, rank_threads: RankThreads
) -> None:
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
    per_rank = rank_threads.run(chunks_of, 3, batch, sharding, size)
    along = -1 if order == "BL" else -2
    pieces = max(math.ceil(max(seq) / size), 1)
    assert {len(chunks) for chunks in per_rank} == {pieces}  # as many on every rank: a collective in each is safe
    places: list[int] = []
    for rank, chunks in enumerate(per_rank):
        for chunk in chunks:
            count = chunk.token_Bc.shape[along]
            assert count <= size
            assert chunk.token_Bc.shape == chunk.target_Bc.shape == chunk.real_Bc.shape == chunk.position_Bc.shape[1:]
            place_c = chunk.place_c
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


def test_chunks_of_padding_and_of_a_mask_for_all_queries(rank_threads: RankThreads) -> None:
    bias = torch.linspace(-1, 1, 4).expand(3, 4)
    for mask in (REAL_BL, bias[:, None, None]):
        for chunks in rank_threads.run(
            chunks_of, 2, Batch(token_BL=tokens(3, 4), attention_mask=mask), sharding_of(3, (1, 3)), 2
        ):
            for chunk in chunks:
                place_c = chunk.place_c
                if mask is REAL_BL:
                    assert chunk.attn_mask is None
                    assert torch.equal(chunk.real_Bc, REAL_BL[:, place_c])
                else:
                    assert chunk.attn_mask is not None
                    assert torch.equal(chunk.attn_mask, bias[:, None, None])


def test_chunks_of_nothing_are_refused(rank_threads: RankThreads) -> None:
    assert rank_threads.run(one_rank, 1) == ["chunks of 0 places; size has to be at least 1"]
