"""Orders of tokens: all arithmetic agrees with loops, for every list of pieces of small grids and for drawn ones."""

import pickle
import random
from collections.abc import Callable, Iterator
from itertools import permutations, product
from typing import Any

import pytest
import torch

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.layout.stacked import stacked_tokens
from tests.support.dispatch.layouts import compositions
from tests.support.orders import contiguous, drawn_lists, shardings, tokens_by_loops
from tests.support.ranks import refusal
from tests.support.tensors import Order

pytestmark = pytest.mark.usefixtures("uncovered")

ORDERS: tuple[Order, Order] = ("BL", "LB")


def every_list(pieces: int, ranks: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every way to give each rank an ordered list of the pieces."""
    for order in permutations(range(pieces)):
        for sizes in compositions(pieces, ranks):
            left = list(order)
            yield tuple(tuple(left.pop(0) for _ in range(size)) for size in sizes)


def small(order: Order) -> Iterator[TokenSharding]:
    for pieces, length, ranks in ((1, 2, 3), (2, 3, 2), (3, 3, 2), (3, 2, 3)):
        for sizes, held in product(compositions(length, pieces), every_list(pieces, ranks)):
            yield TokenSharding(batch=2, seq=Partition(sizes), held=held, order=order)


def drawn(order: Order) -> Iterator[TokenSharding]:
    draw = random.Random(0)
    for _ in range(150):
        pieces, ranks = draw.randint(1, 7), draw.randint(1, 4)
        sharding = TokenSharding(
            batch=draw.choice([0, 1, 3, Partition((1, 2)), Partition((0, 2, 1))]),
            seq=Partition(draw.choice([0, 0, 1, 2, 3, 7]) for _ in range(pieces)),
            held=drawn_lists(pieces, ranks, draw),
            order=order,
        )
        yield sharding
        yield sharding.select(draw.sample(range(sharding.num_ranks), draw.randint(1, sharding.num_ranks)))


def named(order: Order) -> Iterator[TokenSharding]:
    for ranks, rows in product(range(1, 5), range(4)):
        yield from shardings(ranks, rows, order)


def wrong_for_rank(sharding: TokenSharding, rank: int, mine: list[tuple[int, int]], ids: list[int]) -> list[str]:
    token_t = torch.tensor(ids, dtype=torch.int64)
    whole_BL = torch.arange(sharding.num_tokens).view(sharding.global_shape)
    shard_Bl = sharding.shard(whole_BL, rank)
    rank_t, local_t = sharding.locate(token_t)
    rows = sharding.batch.sizes[sharding.rectangles[rank] // len(sharding.held)]
    views = sharding.views(whole_BL, rank)
    along = 1 if sharding.order == "BL" else 0
    checks = {
        "extent": sharding.extent(rank)[0] == rows and sharding.local_sizes[rank] == len(mine),
        "local_shape": shard_Bl.shape == sharding.local_shape(rank),
        "global_token": sharding.global_token(torch.arange(len(mine)), rank).equal(token_t),
        "global_token of an int": [sharding.global_token(i, rank) for i in range(len(mine))] == ids,
        "tokens": sharding.tokens(rank).equal(token_t),
        "rows": sharding.rows(rank).tolist() == [row for row, _ in mine],
        "positions": sharding.positions(rank).tolist() == [place for _, place in mine],
        "shard": shard_Bl.flatten().equal(token_t),
        "a view": len(views) > 1 or not ids or shard_Bl.data_ptr() == whole_BL.data_ptr() + 8 * ids[0],
        "views": torch.cat(views, along).equal(shard_Bl),
        "views of the whole": all(view.untyped_storage().data_ptr() == whole_BL.data_ptr() for view in views),
        "split": [x.shape for x in sharding.split(shard_Bl, rank)] == [x.shape for x in views],
        "runs": [b - a for a, b in sharding.runs(rank)] == [view.shape[along] for view in views],
        "locate": bool((rank_t == rank).all()) and local_t.tolist() == list(range(len(mine))),
    }
    return [f"{name} of rank {rank}" for name, right in checks.items() if not right]


def wrong(sharding: TokenSharding) -> list[str]:
    """What the arithmetic says of an order, and loops do not."""
    rows, length = sharding.batch.total, sharding.seq.total
    held = tokens_by_loops(sharding)
    by_row = sharding.order == "BL"
    ids = [[row * length + place if by_row else place * rows + row for row, place in mine] for mine in held]
    found = [what for rank, mine in enumerate(held) for what in wrong_for_rank(sharding, rank, mine, ids[rank])]
    if stacked_tokens(sharding, "cpu").tolist() != [token for mine in ids for token in mine]:
        found.append("stacked_tokens")
    elsewhere = sorted(set(range(rows * length)) - {token for mine in ids for token in mine})
    if sharding.locate(torch.tensor([*elsewhere, -1, rows * length]))[0].tolist() != [-1] * (len(elsewhere) + 2):
        found.append("locate of tokens that no rank holds")
    if not elsewhere and sharding.num_ranks == len(sharding.batch) * len(sharding.held):
        whole_BLD = torch.arange(2 * rows * length).view(*sharding.global_shape, 2)
        shards = [sharding.shard(whole_BLD, rank) for rank in range(sharding.num_ranks)]
        found += [] if sharding.unshard(shards).equal(whole_BLD) else ["unshard"]
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("of", [small, drawn, named])
def test_arithmetic_agrees_with_loops(of: Callable[[Order], Iterator[TokenSharding]], order: Order) -> None:
    failures = [(sharding, found) for sharding in of(order) if (found := wrong(sharding))]
    assert not failures, f"{len(failures)} orders, first {failures[0]}"


def test_the_named_orders() -> None:
    zigzag = TokenSharding.zigzag(batch=2, length=10, ranks=2)
    assert (zigzag.seq.sizes, zigzag.held) == ((3, 3, 2, 2), ((0, 3), (1, 2)))
    assert [zigzag.runs(rank) for rank in range(2)] == [((0, 3), (8, 10)), ((3, 8),)]
    striped = TokenSharding.striped(batch=2, length=7, ranks=2, stripe=2, order="LB")
    assert (striped.seq.sizes, striped.held, striped.order) == ((2, 2, 2, 1), ((0, 2), (1, 3)), "LB")
    of_runs = TokenSharding.of_runs(batch=1, length=9, runs=[[(6, 9), (0, 2)], [], [(4, 4), (2, 6)]])
    assert [of_runs.positions(rank).tolist() for rank in range(3)] == [[6, 7, 8, 0, 1], [], [2, 3, 4, 5]]


def test_runs_of_contiguous_shards_are_contiguous_shards() -> None:
    runs = [[(0, 2), (2, 3)], [], [(3, 5)]]
    assert TokenSharding.of_runs(batch=2, length=5, runs=runs) == TokenSharding(batch=2, seq=Partition((3, 0, 2)))
    assert TokenSharding.of_runs(batch=2, length=0, runs=[[], []]).local_sizes == (0, 0)


@pytest.mark.parametrize("order", ORDERS)
def test_each_rank_is_cut_in_the_order_of_its_tensor(order: Order) -> None:
    for ranks, parts in product(range(1, 4), range(1, 4)):
        for sharding in shardings(ranks, 2, order):
            cut = sharding.cut(parts)
            assert cut.num_ranks == ranks * parts
            for rank in range(ranks):
                place_l = sharding.with_batch(1).positions(rank)
                mine = [cut.with_batch(1).positions(rank * parts + part) for part in range(parts)]
                assert torch.cat(mine).equal(place_l)
                assert max(map(len, mine)) - min(map(len, mine)) <= 1
            assert wrong(cut) == []
    assert TokenSharding(batch=2, seq=Partition((4, 0, 3))).cut(2).seq.sizes == (2, 2, 0, 0, 2, 1)


def test_other_rows_have_the_same_places() -> None:
    zigzag = TokenSharding.zigzag(batch=3, length=9, ranks=2)
    rows = Partition((2, 0, 1))
    wanted = TokenSharding.zigzag(batch=rows, length=9, ranks=2)
    assert zigzag.with_batch(rows) == wanted
    swapped = zigzag.select([1, 0]).with_batch(rows)
    assert swapped == wanted.select([1, 0, 3, 2, 5, 4])


def test_an_order_is_part_of_the_value() -> None:
    zigzag, again = (TokenSharding.zigzag(batch=2, length=9, ranks=2) for _ in range(2))
    plain = contiguous(zigzag)
    assert zigzag == again
    assert len({zigzag, again, plain, TokenSharding(batch=2, seq=zigzag.seq, held=((1, 2), (0, 3)))}) == 3
    assert pickle.loads(pickle.dumps(zigzag.select([1]))) == zigzag.select([1])
    assert "held=((0, 3), (1, 2))" in repr(zigzag)
    assert "held" not in repr(plain)
    assert plain.places.text == "in order"


def test_long_lists_of_pieces_are_told_apart_in_few_words() -> None:
    striped = TokenSharding.striped(batch=1, length=4000, ranks=2, stripe=1)
    first, second = striped.held
    other = TokenSharding(batch=1, seq=striped.seq, held=(first, (*second[:-2], second[-1], second[-2])))
    assert striped.places.text != other.places.text
    assert max(len(x.places.text) for x in (striped, other)) <= 200


ONCE = "the runs of all ranks have to hold each of the 5 places once"
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: TokenSharding(batch=1, seq=Partition((2, 1, 2)), held=[(0,), (2,)]),
        "piece 1 is held by no rank; the ranks have to hold each of the 3 pieces once",
    ),
    (
        lambda: TokenSharding(batch=1, seq=Partition((2, 1)), held=[(0, 1), (1,)]),
        "piece 1 is held 2 times, by ranks [0, 1]; the ranks have to hold each of the 2 pieces once",
    ),
    (
        lambda: TokenSharding(batch=1, seq=Partition((2, 1)), held=[(0, 1), (2,)]),
        "held gives rank 1 the piece 2; the pieces of seq are 0 to 1",
    ),
    (
        lambda: TokenSharding(batch=1, seq=5, held=[]),
        "held is empty; give the pieces of each rank of the sequence, () for a rank without any",
    ),
    (
        lambda: TokenSharding(batch=1, seq=Partition((2, 1)), held=[0, 1]),  # type: ignore[list-item]
        "held is [0, 1]; give the pieces of each rank of the sequence, e.g. [(0, 3), (1, 2)] for two ranks",
    ),
    (
        lambda: TokenSharding.of_runs(batch=1, length=5, runs=[[(0, 2)], [(3, 5)]]),
        f"places 2 to 2 are held by no rank; {ONCE}",
    ),
    (
        lambda: TokenSharding.of_runs(batch=1, length=5, runs=[[(0, 2)], [(2, 4)]]),
        f"places 4 to 4 are held by no rank; {ONCE}",
    ),
    (lambda: TokenSharding.of_runs(batch=1, length=5, runs=[[(0, 3)], [(2, 5)]]), f"place 2 is held twice; {ONCE}"),
    (
        lambda: TokenSharding.of_runs(batch=1, length=5, runs=[[(0, 3)], [(3, 6)]]),
        "rank 1 has the run (3, 6) of a sequence of 5; a run is its first place and the one after its last",
    ),
    (
        lambda: TokenSharding.zigzag(batch=1, length=5, ranks=0),
        "ranks is 0; it has to be an int of at least 1",
    ),
    (
        lambda: TokenSharding.zigzag(batch=1, length=-1, ranks=2),
        "length is -1; it has to be an int of at least 0",
    ),
    (
        lambda: TokenSharding.striped(batch=1, length=5, ranks=2, stripe=0),
        "stripe is 0; it has to be an int of at least 1",
    ),
    (
        lambda: TokenSharding(batch=Partition((1, 1)), seq=5).with_batch(2),
        "the batch is cut into (1, 1); with_batch needs a sharding of uncut rows",
    ),
]


@pytest.mark.parametrize(("call", "text"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_an_order_that_cannot_be_is_refused(call: Callable[[], Any], text: str) -> None:
    assert refusal(call) == text
