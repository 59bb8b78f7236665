"""How a tensor is split over the ranks on both sides of the exchange, and the boxes that follow from it."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import accumulate

import torch

from moe_dispatch import Partition, TokenSharding

from .boxes import Box, Boxes, Joins, Parts, to_fill, to_read
from .order import dim_of_tokens

MOST = 16  # pairs of parts that a sharding keeps: both ways, of kinds of layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How one tensor is split over the ranks: by heads on one side of the exchange, by tokens on the other.

    Attributes:
        sharding: the tokens of each rank.
        heads: the heads of each rank, side by side in the order of the ranks.
    """

    sharding: TokenSharding
    heads: Partition


def parts_to_heads(splits: tuple[Split, ...], rank: int) -> tuple[Parts, Parts]:
    """Of a header and tensors of the tokens of ``rank``: the heads of each rank, to be read. Of the headers of all
    ranks and tensors of its heads: the tokens of each rank, to be filled."""

    def make() -> tuple[Parts, Parts]:
        return _parts(splits, rank, _heads, to_read), _parts(splits, rank, _tokens, to_fill)

    return _kept("to heads", splits, rank, make)


def parts_to_tokens(splits: tuple[Split, ...], rank: int) -> tuple[Parts, Parts]:
    """The way back: the tokens of each rank, to be read; the heads of each rank, to be filled."""

    def make() -> tuple[Parts, Parts]:
        return _parts(splits, rank, _tokens, to_read), _parts(splits, rank, _heads, to_fill)

    return _kept("to tokens", splits, rank, make)


def _kept(
    way: str, splits: tuple[Split, ...], rank: int, make: Callable[[], tuple[Parts, Parts]]
) -> tuple[Parts, Parts]:
    """What ``make`` gives, kept by the first sharding until so many others were asked for: every layer asks for the
    same. Compiled code makes it once, while it is traced."""
    if torch.compiler.is_compiling():
        return make()
    kept: dict[Hashable, tuple[Parts, Parts]] = splits[0].sharding.keep(("parts", rank), dict)
    if (way, splits) not in kept:
        while len(kept) >= MOST:
            del kept[next(iter(kept))]
        kept[way, splits] = make()
    return kept[way, splits]


def _parts(
    splits: tuple[Split, ...], rank: int, boxes_of: Callable[[Split, int], list[Boxes]], joins: Joins
) -> Parts:
    """Of a header, or where parts are to be filled those of all ranks, and of tensors."""
    ranks = range(splits[0].sharding.num_ranks)
    headers = [[Box(r if joins is to_fill else 0, 1, 0, 1)] for r in ranks]
    boxes = [headers, *(boxes_of(split, rank) for split in splits)]
    return Parts.of(rank, [1, *(dim_of_tokens(split.sharding) for split in splits)], boxes, joins)


def _tokens(split: Split, rank: int) -> list[Boxes]:
    """Of a whole tensor of the heads of ``rank``, the runs of tokens of each rank."""
    n, ranks = split.heads.sizes[rank], range(split.sharding.num_ranks)
    return [[Box(start, stop - start, 0, n) for start, stop in split.sharding.runs(r)] for r in ranks]


def _heads(split: Split, rank: int) -> list[Boxes]:
    """Of a tensor of the tokens of ``rank``, the heads of each rank, run by run of these tokens: that is how
    :func:`_tokens` has them on the other side."""
    sizes = [stop - start for start, stop in split.sharding.runs(rank)]
    runs = list(zip(accumulate(sizes[:-1], initial=0), sizes, strict=True))
    heads = list(zip(split.heads.offsets, split.heads.sizes, strict=True))
    return [[Box(*run, *of_rank) for run in runs] for of_rank in heads]
