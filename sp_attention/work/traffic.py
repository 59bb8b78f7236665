"""What a call sends: bytes from each rank to each other, collective by collective. Counted from the plan by which
rows travel; nothing is run."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from .plan import Work
from .runs import count
from .turns import Wanted

WORD_BYTES = 16  # two int64: of :func:`words_first`
HEADER_NUMBERS = (16, 8)  # of Ulysses' exchanges: a byte of an int64 travels as a number of the tensors' dtype

Pair = tuple[int, int]
Sent = Mapping[Pair, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a row is made of.

    Attributes:
        batch: rows of the batch; each place has as many rows.
        query, output: values of a query head: H and Hv.
        keys: values that travel for a key/value head: H + Hv.
        value_bytes: of a value.
    """

    batch: int
    query: int
    output: int
    keys: int
    value_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """The collectives of a call, in the order in which they start.

    Attributes:
        ranks: of the group.
        forward, backward: for each, bytes by (from rank, to rank); only of different ranks, and none that is 0.
    """

    ranks: int
    forward: tuple[Sent, ...]
    backward: tuple[Sent, ...]


def traffic_of(work: Work, sizes: Sizes) -> Traffic:
    """Of :func:`attention_over_ranks` where q, k and v want gradients; in forward, its words come first.

    A word or a header of an exchange is part of it. Under ``torch.compile`` some more headers travel.
    """
    if work.ranks == 1:
        return Traffic(ranks=1, forward=(), backward=())
    words = _to_all(work.ranks, WORD_BYTES)
    if work.scheme.is_ulysses(work.ranks):
        forward, backward = _ulysses(work, sizes)
    elif work.at_once:
        forward, backward = _by_attend(work, sizes, words)
    else:
        forward, backward = _in_turns(work, sizes)
    return Traffic(ranks=work.ranks, forward=(words, *forward), backward=tuple(backward))


# ---- turn by turn --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Turn:
    """Of one turn, rows times heads by (from rank, to rank), and whether it is a collective at all."""

    sent: Sent
    travels: bool

    def there(self, width: int) -> Sent:
        return {pair: number * width for pair, number in self.sent.items()}

    def home(self, width: int) -> Sent:
        return _turned(self.there(width))


def _turns(work: Work) -> tuple[list[_Turn], list[_Turn]]:
    """Of queries, and of keys."""
    stay = [work.keys_stay(turn) for turn in range(len(work.key_turns))]
    queries = [_turn(work, 0, wanted, work.queries_stay) for wanted in work.query_turns]
    return queries, [_turn(work, 1, *each) for each in zip(work.key_turns, stay, strict=True)]


def _turn(work: Work, side: int, wanted: Wanted, stays: bool) -> _Turn:
    sent: dict[Pair, int] = {}
    heads = [(work.query_heads, work.key_heads_of)[side](rank)[1] for rank in range(work.team_size)]
    for team in () if stays else work.teams:
        for source, rows in work.holders[side].rows(wanted.of(team)).items():
            for to, num_heads in zip(work.members(team), heads, strict=True):
                if source != to and num_heads:
                    sent[source, to] = rows * num_heads
    return _Turn(sent, work.travels(wanted, stays))


def _in_turns(work: Work, sizes: Sizes) -> tuple[list[Sent], list[Sent]]:
    """As ``spread/forward.py`` and ``spread/backward.py`` go through the turns."""
    queries, keys = _turns(work)
    unit = sizes.batch * sizes.value_bytes
    query, output, kv = sizes.query * unit, sizes.output * unit, sizes.keys * unit
    last_query, last_key = len(queries) - 1, len(keys) - 1

    def output_home(i: int, j: int) -> Iterator[Sent]:
        if j == last_key and queries[i].travels:
            yield queries[i].home(output)

    def gradients_home(i: int, j: int) -> Iterator[Sent]:
        if i == last_query and keys[j].travels:
            yield keys[j].home(kv)
        if j == last_key and queries[i].travels:
            yield queries[i].home(query)

    forward = _around(_arrivals(queries, keys, query, kv), output_home, len(keys))
    again = (output, 0) if work.scheme.keep else (query + output, kv)
    backward = _around(_arrivals(queries, keys, *again), gradients_home, len(keys))
    return forward, backward


def _arrivals(
    queries: Sequence[_Turn], keys: Sequence[_Turn], query_width: int, key_width: int
) -> Iterator[list[Sent]]:
    """For every turn of queries with every turn of keys, what travels there for it: queries with the first keys, keys
    with the first queries."""
    for (i, of_queries), (j, of_keys) in product(enumerate(queries), enumerate(keys)):
        parts = [(of_queries, query_width)] * (j == 0) + [(of_keys, key_width)] * (i == 0)
        yield [turn.there(width) for turn, width in parts if turn.travels and width]


def _around(arrivals: Iterator[list[Sent]], home: Callable[[int, int], Iterator[Sent]], num_keys: int) -> list[Sent]:
    """The collectives in order: what comes next starts before what was computed goes home."""
    there = list(arrivals)
    found = _sum(there[0])
    for at, following in enumerate([*there[1:], []]):
        found += _sum(following) + _sum(list(home(*divmod(at, num_keys))))
    return found


def _sum(parts: Sequence[Sent]) -> list[Sent]:
    """One collective of several parts; none of no part."""
    total = Counter[Pair]()
    for part in parts:
        total.update(part)
    return [total] * bool(parts)


# ---- in one exchange each way --------------------------------------------------------------------------


def _by_attend(work: Work, sizes: Sizes, words: Sent) -> tuple[list[Sent], list[Sent]]:
    """As ``spread/by_attend.py``: the words say whether every ``attend`` gave an output."""
    (queries,), (keys,) = _turns(work)
    unit = sizes.batch * sizes.value_bytes
    query, output, kv = sizes.query * unit, sizes.output * unit, sizes.keys * unit
    there = _sum([turn.there(width) for turn, width in ((queries, query), (keys, kv)) if turn.travels])
    back = _sum([turn.home(width) for turn, width in ((queries, query), (keys, kv)) if turn.travels])
    out = [queries.home(output)] * queries.travels
    return [*there, words, *out], [*([queries.there(output)] * queries.travels), *back]


def _ulysses(work: Work, sizes: Sizes) -> tuple[list[Sent], list[Sent]]:
    """As ``call/ulysses.py``: all rows travel, whatever is masked."""
    unit = sizes.batch * sizes.value_bytes
    there, home = Counter[Pair](), Counter[Pair]()
    heads = [(work.query_heads(rank)[1], work.key_heads_of(rank)[1]) for rank in range(work.ranks)]
    rows = [(count(held), count(kv_held)) for held, kv_held in zip(work.held, work.kv_held, strict=True)]
    for (source, (queries, keys)), (to, (num, num_keys)) in product(enumerate(rows), enumerate(heads)):
        if source != to:
            there[source, to] = (queries * num * sizes.query + keys * num_keys * sizes.keys) * unit
            home[to, source] = queries * num * sizes.output * unit
    headers = [_to_all(work.ranks, numbers * sizes.value_bytes) for numbers in HEADER_NUMBERS]
    forward = [sent for pair in zip((there, home), headers, strict=True) for sent in _sum(pair)]
    return forward, [_turned(home), _turned(there)]


def _turned(sent: Sent) -> Sent:
    return {(to, source): number for (source, to), number in sent.items()}


def _to_all(ranks: int, number: int) -> Sent:
    return {(source, to): number for source, to in product(range(ranks), repeat=2) if source != to}
