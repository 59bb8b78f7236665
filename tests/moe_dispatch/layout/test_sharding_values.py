"""A sharding as a value: ids of any shape and size, what it keeps, selections of its ranks, and what it refuses."""

import dataclasses
import pickle
from collections.abc import Callable
from copy import copy, deepcopy
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.layout.stacked import stacked_tokens
from tests.support.dispatch.layouts import Layout, Order
from tests.support.dispatch.plans import sharding_of

ORDERS: tuple[Order, Order] = ("BL", "LB")


def same(got: Tensor, wanted: Tensor) -> bool:
    return got.dtype == wanted.dtype and got.equal(wanted)


@pytest.mark.parametrize("order", ORDERS)
def test_an_int_gives_an_int(order: Order) -> None:
    layout = Layout(batch=(2, 1), seq=(3, 2), order=order)
    sharding = sharding_of(layout)
    for rank, piece_Bl in enumerate(layout.cut(layout.ids()[0])):
        tokens = [sharding.global_token(local, rank) for local in range(piece_Bl.numel())]
        assert tokens == piece_Bl.flatten().tolist()
        assert {type(token) for token in tokens} <= {int}


def test_ids_have_any_shape() -> None:
    sharding = TokenSharding(batch=2, seq=Partition((2, 1)))
    token_AB = sharding.global_token(torch.tensor([[0, 3], [2, 1]]), 0)
    assert token_AB.tolist() == [[0, 4], [3, 1]]
    rank_AB, local_AB = sharding.locate(torch.tensor([[2, 3], [5, 0]]))
    assert (rank_AB.tolist(), local_AB.tolist()) == ([[1, 0], [1, 0]], [[0, 2], [1, 0]])


def test_shards_have_any_trailing_dimensions() -> None:
    layout = Layout(batch=(2, 1), seq=(3, 0))
    x_BLNH = torch.randn(3, 3, 2, 4)
    sharding = sharding_of(layout)
    pieces = [sharding.shard(x_BLNH, rank) for rank in range(4)]
    assert all(piece.equal(wanted) for piece, wanted in zip(pieces, layout.cut(x_BLNH), strict=True))
    assert sharding.unshard(pieces).equal(x_BLNH)


def test_ids_have_no_32_bit_limit() -> None:
    far = 2**40  # L = 2**41 + 5 positions: row 0 is 0 to 2**41 + 4, row 1 starts at 2**41 + 5
    seq = Partition((far, 0, far + 5))
    by_row = TokenSharding(batch=3, seq=seq)
    assert by_row.num_tokens == 3 * (2**41 + 5)
    assert by_row.local_sizes == (3 * far, 0, 3 * (far + 5))
    local_N = torch.tensor([0, far + 4, far + 5, 2 * (far + 5)])
    token_N = torch.tensor([far, 2**41 + 4, 2**41 + 5 + far, 2 * (2**41 + 5) + far])
    assert same(by_row.global_token(local_N, 2), token_N)
    assert [by_row.global_token(int(local), 2) for local in local_N] == token_N.tolist()
    rank_N, back_N = by_row.locate(token_N)
    assert rank_N.tolist() == [2] * 4
    assert same(back_N, local_N)
    by_position = TokenSharding(batch=3, seq=seq, order="LB")
    assert same(by_position.global_token(local_N, 2), local_N + 3 * far)
    assert by_position.locate(local_N + 3 * far)[1].equal(local_N)
    assert by_position.locate(torch.tensor([3 * far - 1]))[0].item() == 0


def test_a_sharding_is_a_value() -> None:
    first = TokenSharding(batch=2, seq=Partition((2, 1)))
    second = TokenSharding(batch=Partition((2,)), seq=Partition([2, 1]), order="BL")
    assert first == second
    others = (
        TokenSharding(batch=2, seq=Partition((1, 2))),
        TokenSharding(batch=2, seq=Partition((2, 1)), order="LB"),
    )
    assert len({first, second, *others, first.select([1, 0])}) == 4
    assert pickle.loads(pickle.dumps(first.select([1]))) == first.select([1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.order = "LB"  # type: ignore[misc]


def test_what_a_sharding_keeps_is_no_part_of_its_value() -> None:
    sharding, other = (TokenSharding(batch=2, seq=Partition((2, 1))) for _ in range(2))
    made: list[str] = []
    for key in ("a", "b", "a"):
        assert sharding.keep(key, lambda key=key: made.append(key) or key) == key
    assert made == ["a", "b"]
    assert sharding == other
    assert hash(sharding) == hash(other)
    assert repr(sharding) == repr(other)
    for copied in (pickle.loads(pickle.dumps(sharding)), deepcopy(sharding), copy(sharding), sharding.select([0, 1])):
        assert copied == sharding
        assert copied.keep("a", lambda: "its own") == "its own"


# ---- a group that is part of the mesh -------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_a_selection_keeps_the_shards_and_their_global_ids(order: Order) -> None:
    layout = Layout(batch=(2, 1), seq=(3, 2), order=order)
    token_BL = layout.ids()[0]
    pieces = layout.cut(token_BL)
    whole = sharding_of(layout)
    for ranks in (ranks for size in range(1, 5) for ranks in permutations(range(4), size)):
        selected = whole.select(ranks)
        assert (selected.num_ranks, selected.num_tokens) == (len(ranks), token_BL.numel()), ranks
        wanted_rank_T, wanted_local_T = torch.full((token_BL.numel(),), -1), torch.full((token_BL.numel(),), -1)
        for rank, held_Bl in enumerate(pieces[old] for old in ranks):
            assert selected.local_shape(rank) == held_Bl.shape, ranks
            assert selected.local_sizes[rank] == held_Bl.numel(), ranks
            assert selected.tokens(rank).equal(held_Bl.flatten()), ranks
            assert selected.shard(token_BL, rank).equal(held_Bl), ranks
            wanted_rank_T[held_Bl.flatten()] = rank
            wanted_local_T[held_Bl.flatten()] = torch.arange(held_Bl.numel())
        rank_T, local_T = selected.locate(torch.arange(token_BL.numel()))
        assert rank_T.equal(wanted_rank_T), ranks
        assert local_T.equal(wanted_local_T), ranks
        assert stacked_tokens(selected, "cpu").equal(torch.cat([pieces[old].flatten() for old in ranks])), ranks


def test_a_selection_of_a_selection_counts_from_the_first() -> None:
    whole = TokenSharding(batch=1, seq=Partition((2, 3, 1)))
    assert whole.select([2, 0]).select([1]) == whole.select([0])
    assert whole.select([0, 1, 2]) == whole


def test_all_ranks_in_another_order_unshard() -> None:
    layout = Layout(batch=(2, 1), seq=(3, 2))
    token_BL = layout.ids()[0]
    pieces = layout.cut(token_BL)
    for ranks in permutations(range(4)):
        assert sharding_of(layout).select(ranks).unshard([pieces[old] for old in ranks]).equal(token_BL), ranks


SHARDING = TokenSharding(batch=2, seq=Partition((3, 0, 2)))
COUNT = "(a Partition, or an int where it is not cut)"
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: TokenSharding(batch=2, seq=4, order="TB"),  # type: ignore[arg-type]
        'order is \'TB\'; use "BL" for (batch, seq, ...) tensors or "LB" for (seq, batch, ...)',
    ),
    (lambda: TokenSharding(batch=-1, seq=4), f"batch {COUNT} is -1; it has to be an int of at least 0"),
    (lambda: TokenSharding(batch=2, seq=4.0), f"seq {COUNT} is 4.0; it has to be an int of at least 0"),  # type: ignore[arg-type]
    (lambda: TokenSharding(batch=True, seq=4), f"batch {COUNT} is True; it has to be an int of at least 0"),
    (lambda: TokenSharding(batch=2, seq=(3, 1)), f"seq {COUNT} is (3, 1); it has to be an int of at least 0"),  # type: ignore[arg-type]
    (lambda: SHARDING.local_shape(3), "rank 3 of a sharding over 3 ranks; it has to be 0 to 2"),
    (lambda: SHARDING.positions(-1), "rank -1 of a sharding over 3 ranks; it has to be 0 to 2"),
    (lambda: SHARDING.rows(3), "rank 3 of a sharding over 3 ranks; it has to be 0 to 2"),
    (lambda: SHARDING.tokens(3), "rank 3 of a sharding over 3 ranks; it has to be 0 to 2"),
    (
        lambda: SHARDING.global_token(torch.tensor([0]), -1),
        "rank -1 of a sharding over 3 ranks; it has to be 0 to 2",
    ),
    (lambda: SHARDING.global_token(6, 0), "local token 6 of rank 0, which holds 6 tokens, from 0 on"),
    (lambda: SHARDING.global_token(-1, 2), "local token -1 of rank 2, which holds 4 tokens, from 0 on"),
    (
        lambda: SHARDING.shard(torch.zeros(5, 2, 7), 0),
        "a tensor of shape (5, 2, 7) to cut by a sharding of the whole (2, 5) in order 'BL'; its first two "
        "dimensions have to be (2, 5)",
    ),
    (lambda: SHARDING.shard(torch.zeros(2, 5), 3), "rank 3 of a sharding over 3 ranks; it has to be 0 to 2"),
    (
        lambda: SHARDING.unshard([torch.zeros(2, 3)]),
        "1 shards for 3 ranks; unshard needs every rank's piece, in rank order",
    ),
    (
        lambda: SHARDING.unshard([torch.zeros(2, 3), torch.zeros(0, 2), torch.zeros(2, 2)]),
        "rank 1 has a tensor of shape (0, 2), but its shard in order 'BL' is (2, 0); pass this rank's tokens, as "
        "sharding.shard(x, 1) cuts them",
    ),
    (
        lambda: SHARDING.select([0, 1]).unshard([torch.zeros(2, 3), torch.zeros(2, 0)]),
        "unshard needs every token of the grid, but the ranks of this sharding hold 6 of 10; describe the tokens "
        "that this group holds, not a selection of a larger mesh",
    ),
    (lambda: SHARDING.select([0, 3]), "rank 3 of a sharding over 3 ranks; it has to be 0 to 2"),
    (lambda: SHARDING.select([1, 1]), "ranks (1, 1) selected; name at least one rank, and each once"),
    (lambda: SHARDING.select([]), "ranks () selected; name at least one rank, and each once"),
]


@pytest.mark.parametrize(("call", "text"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_a_wrong_call_is_refused(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the whole text is compared)
        call()
    assert str(error.value) == text


def test_a_token_of_an_empty_shard_is_refused() -> None:
    with pytest.raises(ValueError, match="local token 0 of rank 1, which holds "):
        SHARDING.global_token(0, 1)


@pytest.mark.parametrize("order", ORDERS)
def test_a_token_that_there_is_not_is_nowhere(order: Order) -> None:
    sharding = sharding_of(Layout(batch=(2,), seq=(3, 2), order=order))
    rank_N, local_N = sharding.locate(torch.tensor([-1, 0, 9, 10, 11, 100]))
    assert (rank_N < 0).tolist() == (local_N < 0).tolist() == [True, False, False, True, True, True]
    empty = TokenSharding(batch=0, seq=Partition((3, 2)))
    assert empty.locate(torch.tensor([0, -1]))[0].tolist() == [-1, -1]
