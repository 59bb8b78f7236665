"""Packed documents over ranks, so that each rank has as much to do in causal attention."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.internals import check_count

from ..attend.documents import Documents

Run = tuple[int, int]
# A document stays whole where it is at most this part of the pairs of a rank. Ranks then miss the mean by as much.
SHARE_OF_WHOLE = 0.025


def balance(
    cu_seqlens: Tensor,
    ranks: int,
    *,
    length: int,
    cu_seqlens_padded: Tensor | None = None,
    order: Literal["BL", "LB"] = "BL",
) -> TokenSharding:
    """An order of tokens in which every rank has as many pairs of a query and a key that it may see, and about as
    many tokens, for :func:`shard_batch` and :func:`ulysses_attention`. No communication: call it on every rank.

    Long documents are cut zigzag, each by itself. Short ones stay whole, so that most of their keys are where their
    queries are. Padding goes where tokens are few.

    Args:
        cu_seqlens: (documents + 1,) ints, as of :class:`Batch`; (0, L) for one document. Read on the host.
        ranks: of the sequence-parallel group.
        length: L, places of the packed sequence.
        cu_seqlens_padded: (documents + 1,) ints, as of :class:`Batch`.
        order: of the dimensions of the tensors, as of ``TokenSharding``.

    Returns:
        A sharding of one row. The fullest rank has at most 5 % more pairs than the mean, or as many more as the last
        token of the longest document has.

    Raises:
        ValueError: documents or numbers that cannot be.
    """
    check_count(length, "length", least=0)
    check_count(ranks, "ranks", least=1)
    documents, problem = Documents.read(cu_seqlens, cu_seqlens_padded, 1, (length, length))
    if documents is None:
        raise ValueError(problem or "cu_seqlens is None; pass (0, L) for one document")
    if problem:
        raise ValueError(problem)
    runs = balanced_runs(documents.spans, length, ranks)
    return TokenSharding.of_runs(batch=1, length=length, runs=runs, order=order)


def balanced_runs(spans: Sequence[Run], length: int, ranks: int) -> list[list[Run]]:
    """The runs of each rank, by place.

    Args:
        spans: (start, stop) of the real tokens of each document, ascending.
        length: of the sequence; what is in no span is padding.
        ranks: of the sequence.
    """
    loads = [Load(rank) for rank in range(ranks)]
    mean = sum(pairs_of(0, stop - start) for start, stop in spans) / ranks
    whole: list[Run] = []
    for start, stop in sorted(spans, key=lambda span: span[0] - span[1]):
        if pairs_of(0, stop - start) <= SHARE_OF_WHOLE * mean:
            whole.append((start, stop))
            continue
        # The rank with the fewest pairs gets the part with the most: loads then differ by no more than parts do.
        parts = sorted(((_pairs(part, start), part) for part in zigzag_parts(start, stop, ranks)), reverse=True)
        loads.sort(key=lambda load: (load.pairs, load.tokens))
        for load, (pairs, part) in zip(loads, parts, strict=True):
            load.take(pairs, *part)
    for start, stop in whole:
        pairs = pairs_of(0, stop - start)
        with_room = [load for load in loads if load.pairs + pairs <= (1 + SHARE_OF_WHOLE) * mean]
        fewest = (
            min(with_room, key=lambda load: load.tokens) if with_room else min(loads, key=lambda load: load.pairs)
        )
        fewest.take(pairs, (start, stop))
    _spread_padding(spans, length, loads)
    loads.sort(key=lambda load: load.rank)
    return [sorted(load.runs) for load in loads]


@dataclass(slots=True)
class Load:
    """What a rank has so far."""

    rank: int
    pairs: int = 0
    tokens: int = 0
    runs: list[Run] = field(default_factory=list)

    def take(self, pairs: int, *runs: Run) -> None:
        self.pairs += pairs
        self.tokens += sum(stop - start for start, stop in runs)
        self.runs += runs


def pairs_of(start: int, stop: int) -> int:
    """Pairs of a query in this run, places in its document, and a key that is not later."""
    return (stop * (stop + 1) - start * (start + 1)) // 2


def zigzag_parts(start: int, stop: int, ranks: int) -> list[tuple[Run, Run]]:
    """2 runs for each rank, the first with the last, the second with the last but one."""
    pieces = Partition.balanced(stop - start, 2 * ranks)
    runs = [(start + at, start + at + size) for at, size in zip(pieces.offsets, pieces.sizes, strict=True)]
    return [(runs[i], runs[-1 - i]) for i in range(ranks)]


def _pairs(part: Sequence[Run], start_of_document: int) -> int:
    return sum(pairs_of(start - start_of_document, stop - start_of_document) for start, stop in part)


def _spread_padding(spans: Sequence[Run], length: int, loads: Sequence[Load]) -> None:
    """Give what is in no document to ranks that have less than their share of the tokens."""
    share = -(-length // len(loads))
    starts, stops = [0, *(stop for _, stop in spans)], [*(start for start, _ in spans), length]
    for start, stop in zip(starts, stops, strict=True):
        at = start
        while at < stop:
            fewest = min(loads, key=lambda load: load.tokens)  # has room: not all ranks have their share
            end = min(stop, at + share - fewest.tokens)
            fewest.take(0, (at, end))
            at = end
