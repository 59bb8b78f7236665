"""Orders of tokens, and who holds which token in them: by loops, which share no code with the library."""

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from tests.support.tensors import Order

Lists = tuple[tuple[int, ...], ...]


def drawn_lists(pieces: int, ranks: int, draw: random.Random) -> Lists:
    """The pieces in any order on any ranks; some ranks may have none."""
    lists: list[list[int]] = [[] for _ in range(ranks)]
    for piece in draw.sample(range(pieces), pieces):
        lists[draw.randrange(ranks)].append(piece)
    return tuple(map(tuple, lists))


def shardings(ranks: int, rows: int, order: Order = "BL") -> Iterator[TokenSharding]:
    """Of uncut rows: zigzag, stripes, and lists with empty pieces and ranks without any."""
    draw = random.Random(7 * ranks + rows)
    for length in (2 * ranks + 3, 1):
        yield TokenSharding.zigzag(batch=rows, length=length, ranks=ranks, order=order)
    yield TokenSharding.striped(batch=rows, length=11, ranks=ranks, stripe=2, order=order)
    for sizes in ((3, 0, 4, 2, 1), (0, 0), (1, 5, 2)):
        lists = drawn_lists(len(sizes), ranks, draw)
        yield TokenSharding(batch=rows, seq=Partition(sizes), held=lists, order=order)
    lists = (*[()] * (ranks - 1), (2, 0, 1))  # all on the last rank
    yield TokenSharding(batch=rows, seq=Partition((2, 3, 1)), held=lists, order=order)


def contiguous(sharding: TokenSharding) -> TokenSharding:
    """The same grid over as many ranks, without an order."""
    seq = Partition.balanced(sharding.seq.total, len(sharding.held))
    return TokenSharding(batch=sharding.batch, seq=seq, order=sharding.order)


def tokens_by_loops(sharding: TokenSharding) -> list[list[tuple[int, int]]]:
    """(row, place) of each rank's tokens, in the order of its flattened tensor."""
    ends_of_rows, ends = [0], [0]
    for size in sharding.batch.sizes:
        ends_of_rows.append(ends_of_rows[-1] + size)
    for size in sharding.seq.sizes:
        ends.append(ends[-1] + size)
    found = []
    for rectangle in sharding.rectangles:
        i, j = rectangle // len(sharding.held), rectangle % len(sharding.held)
        rows = range(ends_of_rows[i], ends_of_rows[i + 1])
        places = [place for piece in sharding.held[j] for place in range(ends[piece], ends[piece + 1])]
        if sharding.order == "BL":
            found.append([(row, place) for row in rows for place in places])
        else:
            found.append([(row, place) for place in places for row in rows])
    return found


def cut_by_loops(x_BLD: Tensor, sharding: TokenSharding, rank: int) -> Tensor:
    """A rank's (b, l, ...) or (l, b, ...) of the whole (B, L, ...), which is batch first for either order."""
    mine = tokens_by_loops(sharding)[rank]
    rows, places = list(dict.fromkeys(row for row, _ in mine)), list(dict.fromkeys(place for _, place in mine))
    empty_tD = x_BLD.flatten(0, 1)[:0]
    mine_tD = torch.stack([x_BLD[token] for token in mine]) if mine else empty_tD
    shape = (len(rows), len(places)) if sharding.order == "BL" else (len(places), len(rows))
    return mine_tD.view(*(shape if mine else sharding.local_shape(rank)), *x_BLD.shape[2:])


def whole_by_loops(shards: list[Tensor], sharding: TokenSharding) -> Tensor:
    """(B, L, ...) from every rank's tensor: the inverse of :func:`cut_by_loops`."""
    whole_BLD = shards[0].new_full((sharding.batch.total, sharding.seq.total, *shards[0].shape[2:]), 77)
    for mine, shard in zip(tokens_by_loops(sharding), shards, strict=True):
        for token, x_D in zip(mine, shard.flatten(0, 1), strict=True):
            whole_BLD[token] = x_D
    return whole_BLD
