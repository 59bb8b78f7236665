"""Orders of tokens: pieces of a sequence, and which of them each of its ranks holds."""

from collections.abc import Sequence
from itertools import chain

from .partition import Partition, check_count
from .places import Held, Run, in_order, joined

Pieces = tuple[Partition, Held]


def zigzag(length: int, ranks: int) -> Pieces:
    """Pieces r and 2 * ranks - 1 - r for rank r: of the keys before them, the two have equally many on every rank."""
    check_count(length, "length", least=0)
    check_count(ranks, "ranks", least=1)
    seq = Partition.balanced(length, 2 * ranks)
    return seq, tuple((rank, 2 * ranks - 1 - rank) for rank in range(ranks))


def striped(length: int, ranks: int, stripe: int) -> Pieces:
    """Pieces of ``stripe`` places, the last one short, dealt to the ranks in turn."""
    check_count(length, "length", least=0)
    check_count(ranks, "ranks", least=1)
    check_count(stripe, "stripe", least=1)
    seq = Partition(min(stripe, length - start) for start in range(0, max(length, 1), stripe))
    return seq, tuple(tuple(range(rank, len(seq), ranks)) for rank in range(ranks))


def of_runs(length: int, runs: Sequence[Sequence[Run]]) -> Pieces:
    """The pieces that runs are, if together they are each place once: one piece for each rank where they are those of
    contiguous shards."""
    check_count(length, "length", least=0)
    for rank, of_rank in enumerate(runs):
        for start, stop in of_rank:
            if not 0 <= start <= stop <= length:
                raise ValueError(
                    f"rank {rank} has the run ({start}, {stop}) of a sequence of {length}; a run is its first place "
                    "and the one after its last"
                )
    spans = sorted((*run, rank, i) for rank, of_rank in enumerate(runs) for i, run in enumerate(of_rank))
    spans = [span for span in spans if span[0] < span[1]] or [(0, 0, 0, 0)]
    before, piece_of_run = 0, dict[tuple[int, int], int]()
    for piece, (start, stop, rank, i) in enumerate([*spans, (length, length, -1, 0)]):
        if start < before:
            raise ValueError(_once(f"place {start} is held twice", length))
        if start > before:
            raise ValueError(_once(f"places {before} to {start - 1} are held by no rank", length))
        before, piece_of_run[rank, i] = stop, piece
    if len(joined(list(chain(*runs)))) == 1:
        lengths = Partition(sum(stop - start for start, stop in of_rank) for of_rank in runs)
        return lengths, in_order(lengths)
    held = (
        tuple(piece_of_run[rank, i] for i in range(max(len(of_rank), 1)) if (rank, i) in piece_of_run)
        for rank, of_rank in enumerate(runs)
    )
    return Partition(stop - start for start, stop, _, _ in spans), tuple(held)


def cut_runs(runs: Sequence[Run], sizes: Sequence[int]) -> list[list[Run]]:
    """Runs cut into parts of these sizes, in order."""
    left, parts = list(reversed(runs)), list[list[Run]]()
    for size in sizes:
        part: list[Run] = []
        while size:
            start, stop = left.pop()
            middle = min(start + size, stop)
            part.append((start, middle))
            size -= middle - start
            if middle < stop:
                left.append((middle, stop))
        parts.append(part)
    return parts


def _once(what: str, length: int) -> str:
    return f"{what}; the runs of all ranks have to hold each of the {length} places once"
