"""shard_batch: what is wrong on one rank, or differs between ranks, is everyone's error."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from moe_dispatch.testing.counting import counting
from sp_attention import Batch, shard_batch, shift_labels
from sp_attention.batch.shard import fingerprint, shortened
from tests.support.attention.batches import GOOD, NONE, sharding_of, tokens
from tests.support.ranks import refusal, world

SMALL = torch.tensor([0, 2, 5])
DIFFERENT = {
    "tokens": Batch(token_BL=tokens(2, 5).flip(0), target_BL=shift_labels(tokens(2, 5))),
    "targets": Batch(token_BL=tokens(2, 5), target_BL=tokens(2, 5)),
    "ignored": Batch(token_BL=tokens(2, 5), ignore_index=-1),
    "positions": Batch(token_BL=tokens(2, 5), position_BL=tokens(2, 5)),
    "padding": Batch(token_BL=tokens(2, 5), target_BL=shift_labels(tokens(2, 5)), attention_mask=tokens(2, 5) != 104),
    "mask": Batch(token_BL=tokens(2, 5), attention_mask=torch.ones(1, 1, 5, 5).bool()),
}
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
    "rank 1: cu_seqlens_padded without cu_seqlens; pass both, or cu_seqlens alone where nothing is padded": replace(
        GOOD, cu_seqlens_padded=SMALL
    ),
    "rank 1: token_BL is list; it has to be a tensor": replace(GOOD, token_BL=tokens(2, 5).tolist()),  # type: ignore[arg-type]
    "rank 1: token_BL is NoneType; it has to be a tensor": Batch(token_BL=None),  # type: ignore[arg-type]
    "rank 1: target_BL is list; it has to be a tensor": replace(GOOD, target_BL=[[0] * 5] * 2),  # type: ignore[arg-type]
    "rank 1: position_BL is list; it has to be a tensor": replace(GOOD, position_BL=[[0] * 5] * 2),  # type: ignore[arg-type]
    "rank 1: attention_mask is list; it has to be a tensor": replace(GOOD, attention_mask=[[1] * 5] * 2),  # type: ignore[arg-type]
    "rank 1: cu_seqlens is list; it has to be a tensor (documents + 1,) of ints": replace(
        GOOD,
        cu_seqlens=[0, 2, 5],  # type: ignore[arg-type]
    ),
    "rank 1: cu_seqlens_padded is tuple; it has to be a tensor (documents + 1,) of ints": replace(
        GOOD,
        cu_seqlens=SMALL,
        cu_seqlens_padded=(0, 2, 5),  # type: ignore[arg-type]
    ),
    "rank 1: ignore_index is None; it has to be an int": replace(GOOD, ignore_index=None),  # type: ignore[arg-type]
    "rank 1: batch is dict; it has to be a Batch": {"token_BL": tokens(2, 5)},  # type: ignore[dict-item]
}


# ---- cases: what the ranks run -------------------------------------------------------------------------


def refused(rank: int, batches: dict[int, Batch], shardings: dict[int, TokenSharding]) -> tuple[str, int]:
    """What shard_batch says on this rank, and whether the group still works afterwards."""
    sharding = shardings.get(rank, sharding_of(2, (2, 1, 2)))
    text = refusal(lambda: shard_batch(batches.get(rank, GOOD), sharding=sharding, group=world()))
    count = torch.ones(())
    dist.all_reduce(count)
    return text, int(count)


def accepted(rank: int) -> None:
    shard_batch(GOOD, sharding=sharding_of(2, (2, 1, 2)), group=world())


def unforeseen(rank: int) -> tuple[str, str]:
    """What is told, and what it comes from, where rank 1 runs into an error of torch's."""
    batch = replace(GOOD, attention_mask=torch.ones(2, 5).to_sparse()) if rank == 1 else GOOD
    with pytest.raises(ValueError, match="rank 1: shard_batch raised") as error:
        shard_batch(batch, sharding=sharding_of(2, (2, 1, 2)), group=world())
    return str(error.value), type(error.value.__cause__).__name__


def exchanges(rank: int, length: int) -> tuple[list[str], int]:
    """The collectives of one shard_batch, and their bytes."""
    with counting() as counts:
        mask = torch.ones(2, 1, length, length).tril().bool()
        batch = Batch(token_BL=tokens(2, length), attention_mask=mask, position_BL=tokens(2, length).expand(3, 2, -1))
        shard_batch(batch, sharding=sharding_of(2, (length, 0, 0)), group=world())
    return counts.collectives, counts.wire_bytes


# ---- what the tests ask --------------------------------------------------------------------------------


def refusals(
    pool: RankPool, batches: dict[int, Batch] | None = None, shardings: dict[int, TokenSharding] | None = None
) -> str:
    """The one text that every rank raises."""
    answers = pool.run(refused, 3, batches or {}, shardings or {})
    assert {count for _, count in answers} == {3}
    assert len({text for text, _ in answers}) == 1
    return answers[0][0]


def test_ranks_that_agree_are_not_refused(rank_pool: RankPool) -> None:
    assert rank_pool.run(accepted, 3) == [None] * 3


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


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_on_one_rank_is_everyones_error(text: str, rank_pool: RankPool) -> None:
    assert refusals(rank_pool, batches={1: WRONG[text]}) == text


def test_no_sharding_on_one_rank_is_everyones_error(rank_pool: RankPool) -> None:
    text = refusals(rank_pool, shardings={2: None})  # type: ignore[dict-item]
    assert text == "rank 2: sharding is None; pass the TokenSharding that says which tokens each rank holds"


def test_an_error_that_nobody_foresaw_is_everyones_too(rank_pool: RankPool) -> None:
    texts, causes = zip(*rank_pool.run(unforeseen, 3), strict=True)
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
        assert f"rank {rank}: the batch is cut into (1, 1, 0), but attention needs each rank to hold a part" in text


def test_a_sharding_that_leaves_tokens_out_is_refused(rank_pool: RankPool) -> None:
    part = sharding_of(2, (2, 1, 1, 1)).select((0, 1, 2))
    text = refusals(rank_pool, shardings=dict.fromkeys(range(3), part))
    assert "rank 0: attention needs every token of the grid, but the ranks of this sharding hold 8 of 10" in text


def test_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match="group is None; pass the process group explicitly"):
        shard_batch(GOOD, sharding=sharding_of(2, (5,)), group=None)  # type: ignore[arg-type]


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
