"""What a call holds beside its own tensors and its output, by the plan: bytes of each rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from .plan import Work
from .runs import count
from .traffic import Sizes

WIDEST = 8  # bytes of a value of float64, whose sums are float64; all other sums are float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        kept: from forward to backward: the tensors that came, if the scheme keeps them; the output where it was
            computed for other ranks; and the log of the sum of each query. With ``offload``, on the host.
        arriving: of tensors that came or are coming, the most at once in forward.
        most: on the device, of both together: what is kept was counted once.
    """

    kept: int
    arriving: int
    most: int


def memory_of(work: Work, sizes: Sizes, rank: int) -> Memory:
    """Of one rank. What computing takes, a tile at a time, and the sums of the gradients are in none of it; an
    ``attend`` keeps the tensors that it got, and may keep more."""
    unit, team = sizes.batch * sizes.value_bytes, work.team(rank)
    heads, key_heads = work.query_heads(rank)[1], work.key_heads_of(rank)[1]
    rows = [count(wanted.of(team)) * heads for wanted in work.query_turns]
    queries = [0 if work.queries_stay else number * sizes.query * unit for number in rows]
    keys = [
        0 if work.keys_stay(turn) else count(wanted.of(team)) * key_heads * sizes.keys * unit
        for turn, wanted in enumerate(work.key_turns)
    ]
    outputs = 0 if work.queries_stay else sum(rows) * sizes.output * unit
    if work.scheme.is_ulysses(work.ranks):
        queries = [sum(map(count, work.held)) * heads * sizes.query * unit]
        keys = [sum(map(count, work.kv_held)) * key_heads * sizes.keys * unit]
        outputs = sum(map(count, work.held)) * heads * sizes.output * unit
    if work.scheme.is_ulysses(work.ranks) or work.at_once:
        came = sum(queries) + sum(keys)
        return Memory(kept=came + outputs, arriving=came, most=came + outputs)
    sums = sum(rows) * sizes.batch * (WIDEST if sizes.value_bytes == WIDEST else 4)
    kept = outputs + sums + (sum(queries) + sum(keys)) * work.scheme.keep
    arriving = _most_arriving(queries, keys, work.scheme.offload)
    if work.scheme.offload:
        return Memory(kept=kept, arriving=arriving, most=arriving)
    return Memory(kept=kept, arriving=arriving, most=kept + arriving * (not work.scheme.keep))


def _most_arriving(queries: Sequence[int], keys: Sequence[int], offload: bool) -> int:
    """As ``Moves.arrivals`` goes through the turns: the next is on its way once this one came, and only then is the
    one before let go. Keys that further queries meet stay, or are on the host."""
    stay = len(queries) > 1 and not offload
    turns = list(product(range(len(queries)), range(len(keys))))
    most = 0
    for at, (i, _) in enumerate(turns):
        near = [(n, *turns[n]) for n in (at - 1, at, at + 1) if 0 <= n < len(turns)]
        of_queries = {query for _, query, _ in near}
        # For further queries, keys do not come again: they are back from where they wait.
        of_keys = {key for n, query, key in near if n <= at or query == 0}
        if stay:
            of_keys |= set(range(turns[at][1] if i == 0 else len(keys)))
        most = max(most, sum(queries[turn] for turn in of_queries) + sum(keys[turn] for turn in of_keys))
    return most
