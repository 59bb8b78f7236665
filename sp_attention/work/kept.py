"""The work of a rank, kept by the sharding of its queries: every layer of a step asks for the same one or two."""

from collections.abc import Hashable
from typing import NamedTuple

from moe_dispatch import TokenSharding

from ..wire.heads import GroupedHeads
from .plan import RankWork, Work
from .scheme import Scheme
from .seen import Seen

MOST = 8  # works of a rank: kinds of layers, and batches of documents


class Asked(NamedTuple):
    """All that the work of a call follows from, beside the sharding of its queries. See :class:`Work`.

    Attributes:
        scheme, heads, key_heads, at_once: as there.
        kv_sharding: of keys and values.
        spans, sides: as of :class:`Seen`.
    """

    scheme: Scheme
    heads: GroupedHeads
    key_heads: tuple[tuple[int, int], ...]
    at_once: bool
    kv_sharding: TokenSharding
    spans: tuple[tuple[int, int, int, int], ...]
    sides: tuple[int, int]


def rank_work(sharding: TokenSharding, rank: int, asked: Asked) -> RankWork:
    """The work of ``rank``; made once, and kept until so many others were asked for."""
    kept: dict[Hashable, RankWork] = sharding.keep(("work over ranks", rank), dict)
    if asked not in kept:
        while len(kept) >= MOST:
            del kept[next(iter(kept))]
        kept[asked] = work_of(sharding, asked).of_rank(rank)
    return kept[asked]


def work_of(sharding: TokenSharding, asked: Asked) -> Work:
    """The work of all ranks."""
    return Work(
        scheme=asked.scheme,
        held=_runs(sharding),
        kv_held=_runs(asked.kv_sharding),
        seen=Seen(asked.spans, asked.sides),
        heads=asked.heads,
        key_heads=asked.key_heads,
        at_once=asked.at_once,
    )


def _runs(sharding: TokenSharding) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(sharding.runs(rank) for rank in range(sharding.num_ranks))
