"""Which rank holds which global token: all the arithmetic agrees with slicing grids of ids.

Every cut of a sequence of up to 9 over up to 4 ranks, empty pieces included, for up to 3 rows and both orders; cuts
of the batch, and of both, for smaller ones. The two formulas that were shipped elsewhere go through the same check.
"""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.layout.stacked import stacked_tokens
from tests.support.dispatch.layouts import Layout, Order, compositions
from tests.support.dispatch.plans import sharding_of

pytestmark = pytest.mark.usefixtures("uncovered")

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


# ---- the check ---------------------------------------------------------------------------------------


def same(got: Tensor, wanted: Tensor) -> bool:
    return got.dtype == wanted.dtype and got.equal(wanted)


def wrong_for_rank(
    sharding: TokenSharding, rank: int, pieces: tuple[Tensor, ...], token_BL: Tensor, global_token: GlobalToken
) -> list[str]:
    """What the sharding says about one rank's tokens, and its pieces of the grids of ids do not."""
    piece_Bl, row_Bl, position_Bl = pieces
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
    pieces_of_ranks = list(zip(*map(layout.cut, layout.ids()), strict=True))
    pieces = [piece_Bl for piece_Bl, _, _ in pieces_of_ranks]
    stacked_T = torch.cat([piece.flatten() for piece in pieces])
    rank_T, local_T = sharding.locate(stacked_T)
    wanted_rank_T = torch.cat([torch.full((piece.numel(),), rank) for rank, piece in enumerate(pieces)])
    checks = {
        "num_ranks": sharding.num_ranks == len(pieces) == len(sharding.local_sizes),
        "num_tokens": sharding.num_tokens == token_BL.numel(),
        "global_shape": sharding.global_shape == token_BL.shape,
        "stacked_tokens": same(stacked_tokens(sharding, "cpu"), stacked_T),
        "rank of locate": same(rank_T, wanted_rank_T),
        "token of locate": same(local_T, torch.cat([torch.arange(piece.numel()) for piece in pieces])),
        "unshard": same(sharding.unshard(pieces), token_BL),
    }
    found = [name for name, right in checks.items() if not right]
    for rank, of_rank in enumerate(pieces_of_ranks):
        found += wrong_for_rank(sharding, rank, of_rank, token_BL, global_token)
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
