"""Further fields of a batch: cut with their tokens, views in the graph of the whole, told where ranks differ."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.utils import _apply_to_tensors

from moe_dispatch.testing import RankThreads
from sp_attention import Batch, ShardedBatch, shard_batch
from sp_attention.batch.batch import Chunk
from sp_attention.batch.shard import fingerprint_of_bits
from tests.support.attention.batches import ORDERS, Order, sharded, sharding_of, tokens
from tests.support.ranks import refusal, world

SEQ = (3, 0, 4)
SHARDING = sharding_of(2, (2, 1, 2))
RULE = "it has to be (B, L, ...) with (B, L) = (2, 5), batch first for either order"
DICT = "it has to be a dict of (B, L, ...) tensors by name"


def fields(length: int) -> dict[str, Tensor]:
    """Of the dtypes and widths that there are; values name their token."""
    token_BL = tokens(2, length)
    return {
        "temperature": token_BL.double() / 7,
        "old_logprob": -token_BL.to(torch.bfloat16),
        "is_action": token_BL % 2 == 0,
        "embedding": token_BL[..., None] + torch.arange(3.0),
        "choices": torch.stack([token_BL, token_BL + 1], dim=-1)[..., None].expand(2, length, 2, 3),
    }


def batch_of(values: Mapping[str, Any]) -> Batch:
    return Batch(token_BL=tokens(2, 5), fields=values)


# ---- cases: what the ranks run -------------------------------------------------------------------------


def cut(rank: int, order: Order) -> tuple[ShardedBatch, list[Chunk]]:
    batch = Batch(token_BL=tokens(2, sum(SEQ)), fields=fields(sum(SEQ)))
    part = sharded(rank, batch, sharding_of(2, SEQ, order))
    return part, list(part.chunks(2))


def gradient_of_the_whole(rank: int, order: Order) -> Tensor:
    """Of the sum of each value of this rank times its token."""
    x_BL = tokens(2, sum(SEQ)).double().requires_grad_()
    part = sharded(rank, Batch(token_BL=tokens(2, sum(SEQ)), fields={"x": x_BL}), sharding_of(2, SEQ, order))
    (part.fields["x"] * part.token_Bl).sum().backward()
    assert x_BL.grad is not None
    return x_BL.grad


def is_a_view(rank: int) -> bool:
    x_BL = torch.ones(2, sum(SEQ))
    part = sharded(rank, Batch(token_BL=tokens(2, sum(SEQ)), fields={"x": x_BL}), sharding_of(2, SEQ, "LB"))
    return part.fields["x"].untyped_storage().data_ptr() == x_BL.untyped_storage().data_ptr()


def names_kept(rank: int) -> list[str]:
    values = {name: torch.ones(2, 5) for name in ("ab", "ba")[rank]}
    return list(shard_batch(batch_of(values), sharding=sharding_of(2, (2, 3)), group=world()).fields)


def refused(rank: int, batch_of_rank: Mapping[int, Batch]) -> str:
    batch = batch_of_rank.get(rank, batch_of({"x": torch.ones(2, 5)}))
    return refusal(lambda: shard_batch(batch, sharding=SHARDING, group=world()))


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_fields_go_with_their_tokens_into_shards_and_chunks(order: Order, rank_threads: RankThreads) -> None:
    for part, chunks in rank_threads.run(cut, 3, order):
        pieces = [(part.token_Bl, part.fields), *((chunk.token_Bc, chunk.fields) for chunk in chunks)]
        for token_Bl, got in pieces:
            batch_first = token_Bl if order == "BL" else token_Bl.transpose(0, 1)
            place_l = batch_first[0]  # row 0 has its places as tokens
            wanted = {name: x_BL[:, place_l] for name, x_BL in fields(sum(SEQ)).items()}
            assert list(got) == list(wanted)
            for name, x_Bl in wanted.items():
                x_Bl = x_Bl if order == "BL" else x_Bl.transpose(0, 1)
                assert got[name].dtype == x_Bl.dtype
                assert torch.equal(got[name], x_Bl), name


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_of_a_field_add_up_over_the_ranks(order: Order, rank_threads: RankThreads) -> None:
    grads = rank_threads.run(gradient_of_the_whole, 3, order)
    assert torch.equal(torch.stack(grads).sum(0), tokens(2, sum(SEQ)).double())


def test_a_shard_of_a_field_is_a_view(rank_threads: RankThreads) -> None:
    assert rank_threads.run(is_a_view, 3) == [True] * 3


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"x": torch.ones(5, 2)}, "fields['x'] is (5, 2); " + RULE),
        ({"x": torch.ones(2)}, "fields['x'] is (2,); " + RULE),
        ({"x": torch.ones(2, 4, 5)}, "fields['x'] is (2, 4, 5); " + RULE),
        ({"x": [[1.0] * 5] * 2}, "fields['x'] is list; it has to be a tensor (B, L, ...)"),
        ({0: torch.ones(2, 5)}, "fields has the name 0; it has to be a text"),
        (torch.ones(2, 5), "fields is Tensor; " + DICT),
        (None, "fields is NoneType; " + DICT),
        (
            {"x": torch.ones(2, 5, device="meta")},
            "fields['x'] is on meta, but token_BL on cpu; move it there",
        ),
    ],
)
def test_fields_that_cannot_be_are_everyones_error(values: Any, text: str, rank_threads: RankThreads) -> None:
    assert rank_threads.run(refused, 3, {1: batch_of(values)}) == [f"rank 1: {text}"] * 3


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"y": torch.ones(2, 5)},
        {"x": torch.ones(2, 5), "y": torch.ones(2, 5)},
        {"x": torch.ones(2, 5, 1)},
        {"x": torch.ones(2, 5).bfloat16()},
        {"x": torch.ones(2, 5).index_fill(1, torch.tensor([4]), 1 + 2**-23)},
    ],
)
def test_fields_that_differ_are_everyones_error(values: dict[str, Tensor], rank_threads: RankThreads) -> None:
    (text,) = set(rank_threads.run(refused, 3, {2: batch_of(values)}))
    assert text.startswith("the ranks disagree about one call (ranks [0, 1]: sharding batch (2,)")
    assert "fields 'x' (2, 5) of torch.float32 " in text


def test_the_order_of_names_does_not_matter_to_the_ranks(rank_threads: RankThreads) -> None:
    """Each rank keeps its own."""
    assert rank_threads.run(names_kept, 2) == [["a", "b"], ["b", "a"]]


def test_a_fingerprint_sees_values_tokens_shapes_and_dtypes() -> None:
    x_BL = torch.randn(2, 3, dtype=torch.float64)
    wide = x_BL[..., None] * torch.arange(1, 5)
    seen = [
        fingerprint_of_bits(x) for x in (x_BL, -x_BL, x_BL.flip(0), x_BL[..., None], x_BL.float(), wide, wide + 1)
    ]
    seen += [
        fingerprint_of_bits(x) for x in (x_BL + 0j, x_BL + 1j, x_BL.bfloat16(), x_BL > 0, wide.to(torch.float8_e5m2))
    ]
    assert len(set(seen)) == len(seen)
    turned = wide.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # of other strides
    assert fingerprint_of_bits(turned.requires_grad_()) == fingerprint_of_bits(wide)
    assert fingerprint_of_bits(x_BL * torch.nan) == fingerprint_of_bits(x_BL * torch.nan)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, replace], ids=["copy", "deepcopy", "replace"])
def test_copies_hold_the_same(again: Callable[[Any], Any], rank_threads: RankThreads) -> None:
    """What keeps or rebuilds the arguments of a module: FSDP rebuilds dataclasses."""
    batch = Batch(token_BL=tokens(2, 7), fields=fields(7))
    (part, chunks), *_ = rank_threads.run(cut, 3, "BL")
    for value in (batch, part, chunks[0]):
        copied = again(value)
        assert type(copied) is type(value)
        assert {name: told(x) for name, x in asdict(copied).items()} == {
            name: told(x) for name, x in asdict(value).items()
        }


def test_a_cast_of_floats_reaches_fields_and_leaves_ints(rank_threads: RankThreads) -> None:
    """As FSDP does it under mixed precision. What has to stay in its dtype is taken from the batch outside."""
    (part, _), *_ = rank_threads.run(cut, 3, "LB")
    (cast,) = _apply_to_tensors(lambda x: x.bfloat16() if x.is_floating_point() else x, (part,))
    assert isinstance(cast, ShardedBatch)
    assert {name: x.dtype for name, x in cast.fields.items()} == {
        "temperature": torch.bfloat16,
        "old_logprob": torch.bfloat16,
        "is_action": torch.bool,
        "embedding": torch.bfloat16,
        "choices": torch.int64,
    }
    assert cast.sharding is part.sharding
    assert torch.equal(cast.token_Bl, part.token_Bl)


def told(x: Any) -> Any:
    """Equal where tensors are."""
    if isinstance(x, Tensor):
        return x.dtype, x.tolist()
    return {name: told(value) for name, value in x.items()} if isinstance(x, dict) else x
