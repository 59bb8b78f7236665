"""A batch in any order of tokens: what each rank gets, chunks of it, and the whole again."""

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankThreads
from sp_attention import Batch, ShardedBatch, gather_outputs, shard_batch
from sp_attention.batch.batch import Chunk
from tests.support.attention.batches import NONE, ORDERS, Order, sharded, tokens
from tests.support.orders import cut_by_loops, shardings, tokens_by_loops
from tests.support.ranks import refusal, world
from tests.support.tensors import grad_of, leaf

pytestmark = pytest.mark.usefixtures("uncovered")

Part = tuple[ShardedBatch, list[list[Chunk]], Tensor, Tensor]


def parts(rank: int, batch: Batch, cases: list[TokenSharding]) -> list[Part]:
    """This rank's part, its chunks by size, the whole of an output, and the gradient of that."""
    found = []
    for sharding in cases:
        part = sharded(rank, batch, sharding)
        x_BlD = leaf(part.fields["value"])
        whole_BLD = gather_outputs(x_BlD, batch=part, group=world())
        (whole_BLD * batch.fields["value"]).sum().backward()
        found.append((part, [list(part.chunks(size)) for size in (1, 2, 5)], whole_BLD.detach(), grad_of(x_BlD)))
    return found


def batch_of(rows: int, length: int, documents: bool) -> Batch:
    token_BL, draw = tokens(rows, length), torch.Generator().manual_seed(length)
    value_BLD = torch.randn(rows, length, 2, generator=draw, dtype=torch.float64)
    if documents:  # padding at places 2 and the last
        half = length // 2
        return Batch(
            token_BL=token_BL,
            fields={"value": value_BLD},
            cu_seqlens=torch.tensor([0, 2, length - 2]),
            cu_seqlens_padded=torch.tensor([0, 3, length]),
            loss_mask_BL=token_BL != half,
        )
    return Batch(
        token_BL=token_BL,
        fields={"value": value_BLD},
        attention_mask=torch.rand(rows, 1, length, length, generator=draw) + 0.5,
        position_BL=torch.stack([token_BL, token_BL * 2]),
    )


def wanted_fields(batch: Batch, documents: bool) -> dict[str, Tensor]:
    """(B, L) of every token, by loops over places."""
    rows, length = batch.token_BL.shape
    spans = [(0, 2), (3, length - 1)] if documents else [(0, length)]
    target_BL = torch.full((rows, length), NONE)
    position_BL, real_BL = torch.zeros(rows, length, dtype=torch.int64), torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        for start, stop in spans:
            for place in range(start, stop):
                real_BL[row, place] = True
                position_BL[row, place] = place - start
                if place + 1 < stop and not (documents and place == length // 2):
                    target_BL[row, place] = batch.token_BL[row, place + 1]
    return {"token": batch.token_BL, "target": target_BL, "position": position_BL, "real": real_BL}


def assert_right_chunks(
    chunks: list[Chunk], size: int, whole: dict[str, Tensor], batch: Batch, sharding: TokenSharding, rank: int
) -> None:
    place_of_token = [place for row, place in tokens_by_loops(sharding)[rank] if row == 0]
    assert [place for chunk in chunks for place in chunk.place_c.tolist()] == place_of_token
    assert len(chunks) == max(-(-max(map(len, tokens_by_loops(sharding.with_batch(1)))) // size), 1)
    for chunk in chunks:
        assert len(chunk.place_c) <= size
        for name, got in (("token", chunk.token_Bc), ("target", chunk.target_Bc), ("real", chunk.real_Bc)):
            got_Bc = got if sharding.order == "BL" else got.T
            assert torch.equal(got_Bc, whole[name][:, chunk.place_c]), name
        if batch.attention_mask is not None and batch.attention_mask.shape[2] > 1:
            assert chunk.attn_mask is not None
            assert torch.equal(chunk.attn_mask, batch.attention_mask[:, :, chunk.place_c])


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_each_rank_gets_its_tokens(ranks: int, order: Order, documents: bool, rank_threads: RankThreads) -> None:
    rows = 1 if documents else 3
    for length, cases in by_length(shardings(ranks, rows, order)).items():
        if length < 6 and documents:
            continue
        batch = batch_of(rows, length, documents)
        whole = wanted_fields(batch, documents)
        per_rank = rank_threads.run(parts, ranks, batch, cases)
        for i, sharding in enumerate(cases):
            for rank, found in enumerate(per_rank):
                part, chunks_of_size, whole_BLD, grad_BlD = found[i]
                for name, got in (("token", part.token_Bl), ("target", part.target_Bl), ("real", part.real_Bl)):
                    assert torch.equal(got, cut_by_loops(whole[name], sharding, rank)), (name, sharding)
                if documents:
                    assert torch.equal(part.position_Bl, cut_by_loops(whole["position"], sharding, rank))
                else:
                    both = [cut_by_loops(whole["token"] * factor, sharding, rank) for factor in (1, 2)]
                    assert torch.equal(part.position_Bl, torch.stack(both))
                for chunks, size in zip(chunks_of_size, (1, 2, 5), strict=True):
                    assert_right_chunks(chunks, size, whole, batch, sharding, rank)
                value_BLD = batch.fields["value"] * whole["real"][..., None]
                assert torch.equal(part.fields["value"], cut_by_loops(batch.fields["value"], sharding, rank))
                assert torch.equal(whole_BLD, value_BLD)
                assert torch.equal(grad_BlD, ranks * cut_by_loops(value_BLD, sharding, rank))


def by_length(cases: object) -> dict[int, list[TokenSharding]]:
    found: dict[int, list[TokenSharding]] = {}
    for sharding in cases:  # type: ignore[attr-defined]
        found.setdefault(sharding.seq.total, []).append(sharding)
    return found


def told(rank: int) -> list[str]:
    token_BL = tokens(2, 8)

    def text(sharding: TokenSharding) -> str:
        return refusal(lambda: shard_batch(Batch(token_BL=token_BL), sharding=sharding, group=world()))

    zigzag = TokenSharding.zigzag(batch=2, length=8, ranks=2)
    return [
        text(TokenSharding(batch=2, seq=Partition.even(8, 2)) if rank else zigzag),
        text(TokenSharding(batch=2, seq=zigzag.seq, held=((3, 0), (1, 2))) if rank else zigzag),
        text(TokenSharding.zigzag(batch=2, length=8, ranks=3)),
        text(TokenSharding(batch=2, seq=Partition((4, 3)), held=((1,), (0,)))),
    ]


def test_another_order_on_one_rank_is_everyones_error(rank_threads: RankThreads) -> None:
    first, second = rank_threads.run(told, 2)
    assert first == second
    words = (
        ("pieces ((0, 3), (1, 2))", "pieces in order"),
        ("pieces ((0, 3), (1, 2))", "pieces ((3, 0), (1, 2))"),
        ("the token sharding describes 3 ranks, but the group has 2",),
        ("(2, 8)", "(2, 7)"),
    )
    for text, wanted in zip(first, words, strict=True):
        assert all(word in text for word in wanted), text
