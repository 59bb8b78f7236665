"""Which rank holds which global token: all the arithmetic agrees with slicing grids of ids.

Every cut of a sequence of up to 9 over up to 4 ranks, empty pieces included, for up to 3 rows and both orders; cuts
of the batch, and of both, for smaller ones. The two formulas that were shipped elsewhere go through the same check.
"""

import dataclasses
import pickle
from collections.abc import Callable, Iterator, Sequence
from copy import copy, deepcopy
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from tests.support.dense import Layout, Order, compositions

ORDERS: tuple[Order, Order] = ("BL", "LB")
GlobalToken = Callable[[TokenSharding, Tensor, int], Tensor]


def seq_cuts(order: Order, *, rows: Sequence[int] = range(4), length: int = 9, ranks: int = 4) -> Iterator[Layout]:
    for num_rows in rows:
        for total in range(length + 1):
            for pieces in range(1, ranks + 1):
                for seq in compositions(total, pieces):
                    yield Layout(batch=(num_rows,), seq=seq, order=order)


def batch_cuts(order: Order) -> Iterator[Layout]:
    """The batch cut over 2 to 4 ranks, and both cut over 2 x 2."""
    for num_rows in range(4):
        for pieces, seq_pieces, length in ((2, 1, 6), (3, 1, 6), (4, 1, 6), (2, 2, 5)):
            for batch in compositions(num_rows, pieces):
                for total in range(length + 1):
                    for seq in compositions(total, seq_pieces):
                        yield Layout(batch=batch, seq=seq, order=order)


def sharding_of(layout: Layout) -> TokenSharding:
    batch, seq = (cut[0] if len(cut) == 1 else Partition(cut) for cut in (layout.batch, layout.seq))
    return TokenSharding(batch=batch, seq=seq, order=layout.order)


# ---- the check ---------------------------------------------------------------------------------------


def same(got: Tensor, wanted: Tensor) -> bool:
    return got.dtype == wanted.dtype and got.equal(wanted)


def wrong_for_rank(sharding: TokenSharding, rank: int, layout: Layout, global_token: GlobalToken) -> list[str]:
    """What the sharding says about one rank's tokens, and slicing the grids of ids does not."""
    token_BL, row_BL, position_BL = layout.ids()
    piece_Bl, row_Bl, position_Bl = (layout.cut(grid)[rank] for grid in (token_BL, row_BL, position_BL))
    token_t, local_t = piece_Bl.flatten(), torch.arange(piece_Bl.numel())
    shard_Bl = sharding.shard(token_BL, rank)
    checks = {
        "local_shape": sharding.local_shape(rank) == piece_Bl.shape,
        "local_sizes": sharding.local_sizes[rank] == piece_Bl.numel(),
        "global_token": same(global_token(sharding, local_t, rank), token_t),
        "tokens": same(sharding.tokens(rank), token_t),
        "rows": same(sharding.rows(rank), row_Bl.flatten()),
        "positions": same(sharding.positions(rank), position_Bl.flatten()),
        "shard": same(shard_Bl, piece_Bl) and shard_Bl.data_ptr() == piece_Bl.data_ptr(),
    }
    return [f"{name} of rank {rank}" for name, right in checks.items() if not right]


def wrong(
    sharding: TokenSharding, layout: Layout, global_token: GlobalToken = TokenSharding.global_token
) -> list[str]:
    """What of the sharding's arithmetic does not agree with slicing grids of ids. Empty where all is right."""
    token_BL = layout.ids()[0]
    pieces = layout.cut(token_BL)
    stacked_T = torch.cat([piece.flatten() for piece in pieces])
    rank_T, local_T = sharding.locate(stacked_T)
    wanted_rank_T = torch.cat([torch.full((piece.numel(),), rank) for rank, piece in enumerate(pieces)])
    checks = {
        "num_ranks": sharding.num_ranks == len(pieces) == len(sharding.local_sizes),
        "num_tokens": sharding.num_tokens == token_BL.numel(),
        "global_shape": sharding.global_shape == token_BL.shape,
        "stacked_tokens": same(sharding.stacked_tokens(), stacked_T),
        "rank of locate": same(rank_T, wanted_rank_T),
        "token of locate": same(local_T, torch.cat([torch.arange(piece.numel()) for piece in pieces])),
        "unshard": same(sharding.unshard(pieces), token_BL),
    }
    found = [name for name, right in checks.items() if not right]
    for rank in range(len(pieces)):
        found += wrong_for_rank(sharding, rank, layout, global_token)
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cuts", [seq_cuts, batch_cuts])
def test_arithmetic_agrees_with_slicing_a_grid_of_ids(
    cuts: Callable[[Order], Iterator[Layout]], order: Order
) -> None:
    failures = [(layout, found) for layout in cuts(order) if (found := wrong(sharding_of(layout), layout))]
    assert not failures, f"{len(failures)} layouts, first {failures[0]}"


# ---- formulas that were shipped: the check has to see them --------------------------------------------


def without_batch(sharding: TokenSharding, local_token: Tensor, rank: int) -> Tensor:
    return local_token + rank * sharding.local_sizes[rank]


def with_padded_length(sharding: TokenSharding, local_token: Tensor, rank: int) -> Tensor:
    ranks, padded = sharding.num_ranks, max(*sharding.seq.sizes, 1)
    return (local_token // padded) * (padded * ranks) + rank * padded + local_token % padded


def seen(formula: GlobalToken, layout: Layout) -> bool:
    return bool(wrong(sharding_of(layout), layout, formula))


@pytest.mark.parametrize("formula", [without_batch, with_padded_length])
def test_two_rows_in_uneven_shards_show_a_wrong_formula(formula: GlobalToken) -> None:
    assert seen(formula, Layout(batch=(2,), seq=(2, 1)))
    assert seen(formula, Layout(batch=(2,), seq=(3, 0, 2)))
    found = [layout for layout in seq_cuts("BL", rows=[2], length=5, ranks=3) if seen(formula, layout)]
    assert len(found) > 30
    for layout in found:
        only = wrong(sharding_of(layout), layout, formula)
        assert all(name.startswith("global_token of rank") for name in only), (layout, only)


def even_cuts(rows: Sequence[int], order: Order) -> Iterator[Layout]:
    return (cut for cut in seq_cuts(order, rows=rows) if len(set(cut.seq)) == 1)


@pytest.mark.parametrize("formula", [without_batch, with_padded_length])
def test_one_row_in_even_shards_hides_a_wrong_formula(formula: GlobalToken) -> None:
    assert not [layout for layout in even_cuts([1], "BL") if seen(formula, layout)]
    assert not [layout for layout in even_cuts([1], "LB") if seen(formula, layout)]


def test_even_shards_sequence_first_hide_the_offset_without_batch() -> None:
    assert not [layout for layout in even_cuts(range(4), "LB") if seen(without_batch, layout)]
    assert [layout for layout in even_cuts([2], "BL") if seen(without_batch, layout)]


def test_even_shards_hide_the_padded_length() -> None:
    assert not [layout for layout in even_cuts(range(4), "BL") if seen(with_padded_length, layout)]
    for total in range(10):
        for ranks in range(1, 5):
            layout = Layout(batch=(1,), seq=Partition.chunked(total, ranks).sizes)
            assert not seen(with_padded_length, layout), layout  # and one row does, as it was tested


# ---- what the grids do not show ------------------------------------------------------------------------


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
        assert selected.stacked_tokens().equal(torch.cat([pieces[old].flatten() for old in ranks])), ranks


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


# ---- errors -----------------------------------------------------------------------------------------------

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
