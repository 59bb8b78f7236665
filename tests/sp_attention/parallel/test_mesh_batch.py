"""``Parallel.shard`` gives each rank its rows and places, and tells each kind of layer of the rest."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding, gather_tokens
from moe_dispatch.testing import RankThreads
from sp_attention import Batch, Parallel
from tests.support.orders import cut_by_loops
from tests.support.ranks import refusal

LENGTHS, ROWS = (4, 0, 3), 3


def whole_batch() -> Batch:
    token_BL = torch.arange(21).view(3, 7)
    return Batch(
        token_BL=token_BL,
        target_BL=token_BL + 100,
        loss_mask_BL=token_BL % 5 != 0,
        position_BL=torch.stack([token_BL, token_BL * 2, token_BL * 3]),
        attention_mask=token_BL != 14,  # the first of the last row
        fields={"advantage": token_BL[..., None] * 0.5},
    )


def cut(rank: int) -> None:
    part = Parallel(dp=2, sp=3, ep=3, device_type="cpu").shard(whole_batch(), lengths=LENGTHS)
    rows, places = (slice(0, 2), slice(2, 3))[rank // 3], (slice(0, 4), slice(4, 4), slice(4, 7))[rank % 3]
    mine = whole_batch().token_BL[rows, places]
    counts = (mine % 5 != 0) & (mine != 14)
    assert torch.equal(part.batch.token_Bl, mine)
    assert torch.equal(part.batch.target_Bl, torch.where(counts, mine + 100, -100))
    assert torch.equal(part.batch.position_Bl, torch.stack([mine, mine * 2, mine * 3]))
    assert torch.equal(part.batch.real_Bl, mine != 14)
    assert torch.equal(part.batch.fields["advantage"], mine[..., None] * 0.5)
    assert (part.sharding.batch.sizes, part.sharding.seq.sizes) == ((2, 1), LENGTHS)
    assert part.attention["sharding"].batch.sizes == ((2,), (1,))[rank // 3]
    assert part.attention["sharding"].seq.sizes == LENGTHS
    assert ("key_padding_mask" in part.attention) == (rank >= 3)  # where a row has padding
    assert part.moe["sharding"].num_ranks == 3
    assert part.moe["sharding"].tokens(rank % 3).tolist() == part.sharding.tokens(rank).tolist()


def test_rows_go_over_dp_and_places_over_sp(rank_threads: RankThreads) -> None:
    rank_threads.run(cut, 6)


def regions(rank: int) -> tuple[Tensor, Tensor]:
    parallel = Parallel(sp=2, tp=2, ep=4, device_type="cpu")
    part = parallel.shard(Batch(token_BL=torch.arange(14).view(2, 7)), lengths=(4, 3))
    assert part.sharding.seq.sizes == (2, 2, 2, 1)
    assert part.attention["sharding"].seq.sizes == (4, 3)
    region_Bm = gather_tokens(part.batch.token_Bl, sharding=part.region, group=parallel.mesh.dense.get_group("tp"))
    return region_Bm, parallel.gather(part.batch.token_Bl, part)


def test_with_tensor_parallelism_ranks_of_a_region_share_its_places(rank_threads: RankThreads) -> None:
    whole = torch.arange(14).view(2, 7)
    for rank, (region_Bm, gathered) in enumerate(rank_threads.run(regions, 4)):
        assert torch.equal(region_Bm, whole[:, :4] if rank < 2 else whole[:, 4:])
        assert torch.equal(gathered, whole)


def in_zigzag(rank: int, dp: int, tp: int) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's tokens, their places in rows of their own, and the whole again; the region checked."""
    sharding = TokenSharding.zigzag(batch=3, length=7, ranks=2)
    parallel = Parallel(dp=dp, sp=2, tp=tp, ep=2 * dp * tp, device_type="cpu")
    part = parallel.shard(whole_batch(), sharding=sharding)
    assert part.attention["sharding"].with_batch(3) == sharding
    assert part.moe["sharding"] == part.sharding
    sp_rank = rank // tp % 2
    region_Bm = gather_tokens(part.batch.token_Bl, sharding=part.region, group=parallel.mesh.dense.get_group("tp"))
    rows = slice(2 * (rank // (2 * tp)), 2 if dp == 2 and rank < 2 * tp else 3)
    assert torch.equal(region_Bm, cut_by_loops(whole_batch().token_BL, sharding, sp_rank)[rows])
    assert torch.equal(part.batch.token_Bl.flatten(), part.sharding.tokens(rank))  # the tokens are their numbers
    return part.batch.token_Bl, part.batch.target_Bl, parallel.gather(part.batch.token_Bl, part)


@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_an_order_of_tokens_goes_over_dp_and_tp(dp: int, tp: int, rank_threads: RankThreads) -> None:
    whole_BL = whole_batch().token_BL
    counts_BL = (whole_BL % 5 != 0) & (whole_BL != 14)
    target_of_token = torch.where(counts_BL, whole_BL + 100, -100).flatten()
    found = rank_threads.run(in_zigzag, 2 * dp * tp, dp, tp)
    assert sorted(torch.cat([token_Bl.flatten() for token_Bl, _, _ in found]).tolist()) == list(range(21))
    for token_Bl, target_Bl, gathered_BL in found:
        assert torch.equal(target_Bl, target_of_token[token_Bl])
        assert torch.equal(gathered_BL, whole_BL)


def refused(rank: int) -> list[str]:
    parallel, batch = Parallel(dp=2, sp=2, device_type="cpu"), whole_batch()

    def text(batch: Any, lengths: tuple[int, ...] | None = (4, 3), sharding: Any = None) -> str:
        return refusal(lambda: parallel.shard(batch, lengths=lengths, sharding=sharding))

    zigzag = TokenSharding.zigzag(batch=3, length=7, ranks=2)

    return [
        text(batch, (4, 4)),
        text(batch, (7,)),
        text(batch, (8, -1)),
        text(batch, (4, 3) if rank else (3, 4)),
        text(replace(batch, token_BL=batch.token_BL + (rank == 3))),  # of another dp rank
        text(replace(batch, token_BL=batch.token_BL[0])),
        text(replace(batch, target_BL=batch.token_BL[:2]) if rank == 1 else batch),
        text({"token_BL": batch.token_BL}),
        text(batch, (4, 3), zigzag),
        text(batch, None, "zigzag"),
        text(batch, None, TokenSharding.zigzag(batch=3, length=7, ranks=4)),
        text(batch, None, TokenSharding.zigzag(batch=3, length=7, ranks=2, order="LB")),
        text(batch, None, TokenSharding.zigzag(batch=Partition((2, 1)), length=7, ranks=1)),
        text(batch, None, zigzag.select([1, 0]) if rank else zigzag),
        refusal(lambda: Parallel(sp=2, tp=2, device_type="cpu").fully_shard(torch.nn.Linear(2, 2))),
    ]


def test_what_cannot_be_cut_is_refused_on_every_rank(rank_threads: RankThreads) -> None:
    texts, *others = rank_threads.run(refused, 4)
    assert others == [texts] * 3
    wanted = (
        "lengths (4, 4) for a sequence of 7 over sp = 2",
        "give each rank of sp a length",
        "-1",
        "seq (4, 3)",
        "tokens",
        "it has to be (B, L)",
        "rank 1",
        "has to be a Batch",
        "lengths and a sharding; the sharding says how many places each rank of sp holds: leave lengths out",
        "sharding is 'zigzag'; pass the TokenSharding",
        "over 4 ranks, for a batch of (B, L) = (3, 7) over sp = 2",
        "in order 'LB' over 2 ranks",
        "give whole rows over the ranks of sp, in order 'BL', e.g. TokenSharding.zigzag(batch=3, length=7, ranks=2)",
        "ranks (1, 0, 3, 2)",
        "fully_shard on a mesh with tp = 2",
    )
    for text, words in zip(texts, wanted, strict=True):
        assert words in text, text
