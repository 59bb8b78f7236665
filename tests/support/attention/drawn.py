"""Cases drawn once in the parent: the same in every run."""

from itertools import pairwise, product
from zlib import crc32

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.support.attention.case import Case
from tests.support.attention.masks import CROSS, KINDS, PACKED

HEADS = [(1, 1), (2, 1), (3, 3), (4, 4), (4, 2), (6, 3), (7, 7), (8, 2), (12, 3)]
WIDTHS = [(6, 6), (6, 4), (4, 3)]
BATCH_OF_CASES = 3  # of each kind of mask, in a normal run
CUTS = ("balanced", "one rank", "random")


def cuts(length: int, ranks: int, kind: str) -> st.SearchStrategy[tuple[int, ...]]:
    if kind == "balanced":
        return st.just(tuple(len(range(rank, length, ranks)) for rank in range(ranks)))
    if kind == "one rank":
        owners = st.integers(0, ranks - 1)
        return owners.map(lambda owner: tuple(length if rank == owner else 0 for rank in range(ranks)))
    marks = st.lists(st.integers(0, length), min_size=ranks - 1, max_size=ranks - 1)
    return marks.map(lambda drawn: tuple(end - start for start, end in pairwise([0, *sorted(drawn), length])))


def lengths_to_try(ranks: int) -> list[int]:
    return sorted({1, max(ranks - 1, 1), ranks, ranks + 1, 7, 16, 67})


@st.composite
def cases(
    draw: st.DrawFn, ranks: int, kind: str, queries: int | None = None, num_heads: tuple[int, int] | None = None
) -> Case:
    lengths = lengths_to_try(ranks)
    queries = queries or draw(st.sampled_from(lengths))
    keys = draw(st.sampled_from([n for n in lengths if n != queries])) if kind in CROSS else queries
    seq = draw(cuts(queries, ranks, draw(st.sampled_from(CUTS))))
    num_heads = num_heads or draw(st.sampled_from(HEADS))
    head_cut = draw(st.sampled_from([None, None, "one rank", "random"]))
    return Case(
        ranks=ranks,
        kind=kind,
        batch=1 if kind in PACKED else draw(st.sampled_from([1, 2, 3])),
        seq=seq,
        kv_seq=draw(cuts(keys, ranks, draw(st.sampled_from(CUTS)))) if kind in CROSS else seq,
        num_heads=num_heads,
        widths=draw(st.sampled_from(WIDTHS)),
        order=draw(st.sampled_from(["BL", "LB"])),
        heads=None if head_cut is None else draw(cuts(num_heads[0], ranks, head_cut)),
        scale=draw(st.sampled_from([None, 0.3])),
        seed=draw(st.integers(0, 2**31)),
    )


def drawn(strategy: st.SearchStrategy[Case], number: int, name: str) -> list[Case]:
    """The same cases in every run, others for every name."""
    found: list[Case] = []

    @seed(crc32(name.encode()))
    @settings(
        derandomize=True,
        database=None,
        max_examples=number,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.nested_given],
    )
    @given(strategy)
    def keep(case: Case) -> None:
        found.append(case)

    keep()
    return list(dict.fromkeys(found))


def cases_of_ranks(ranks: int, number: int) -> list[Case]:
    return [case for kind in KINDS for case in drawn(cases(ranks, kind), number, f"{ranks} {kind}")]


def cases_of_every_size(ranks: int, kind: str) -> list[Case]:
    """For the sweep: every length with every number of heads."""
    return [
        case
        for queries, num_heads in product(lengths_to_try(ranks), HEADS)
        for case in drawn(cases(ranks, kind, queries, num_heads), 4, f"{ranks} {kind} {queries} {num_heads}")
    ]
