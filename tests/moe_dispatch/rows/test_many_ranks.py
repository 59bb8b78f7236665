"""Every kind of plan on 16, 64 and 256 ranks: rows bit for bit, outputs and every gradient as in the dense layer."""

from functools import cache
from itertools import product

import pytest
import torch

from moe_dispatch import StaticSizes
from moe_dispatch.testing import RankThreads
from tests.support.dispatch.dense import Answer, Case, dense_answer, differences, make_case
from tests.support.dispatch.layer import Layer, failures_of, misplaced_rows
from tests.support.dispatch.layouts import Layout
from tests.support.dispatch.plans import Kind, enough, planning

pytestmark = pytest.mark.usefixtures("uncovered")

SIZES = (16, 64, 256)
ALL_KINDS: tuple[Kind, ...] = ("by ids", "by counts", "static", "hierarchical")


def make(name: str, ranks: int) -> Case:
    """Shards and experts that are as unlike as so many ranks allow."""
    alone = ranks // 3  # the rank that holds everything
    none_before, none_behind = (0,) * alone, (0,) * (ranks - 1 - alone)
    uneven = Layout(batch=(2,), seq=(3, 0, 1, 2) * (ranks // 4))
    one_rank = Layout(batch=(2,), seq=(*none_before, 30, *none_behind), order="LB")
    both_cut = Layout(batch=(1, 0, 2, 1), seq=(3, 0, 1, 2) * (ranks // 16))
    most_in_one = Layout(batch=(1,), seq=(*[1] * (ranks - 1), 40), order="LB")
    one_of_many = (*none_before, 4, *[1] * len(none_behind))
    layout, routing, experts = {
        "uneven shards": (uneven, "uniform", (1,) * ranks),
        "both cut": (both_cut, "top_k", (2, 0, 1, 1) * (ranks // 4)),
        "one shard of most": (most_in_one, "holes", (0, 2) * (ranks // 2)),
        "one rank with all tokens": (one_rank, "duplicates", (1, 1, 0, 3) * (ranks // 4)),
        "one rank with all experts": (uneven, "holes", (*none_before, 5, *none_behind)),
        "all rows on one rank": (uneven, "one_rank", one_of_many),
        "all rows of one rank with all tokens": (one_rank, "one_expert", (1,) * ranks),
        "no rows at all": (uneven, "none", (1,) * ranks),
    }[name]
    return make_case(layout, routing, experts=experts, num_choices=3, dim=5, width=4)


NAMES = (
    "uneven shards",
    "both cut",
    "one shard of most",
    "one rank with all tokens",
    "one rank with all experts",
    "all rows on one rank",
    "all rows of one rank with all tokens",
    "no rows at all",
)


@cache  # for every kind of plan
def answered(name: str, ranks: int) -> tuple[Case, Answer]:
    """The case, and what it has to give."""
    torch.manual_seed(ranks)
    case = make(name, ranks)
    return case, dense_answer(case)


def run_case(
    rank: int, kind: Kind, sizes: StaticSizes, in_combine: tuple[bool, ...], case: Case, answer: Answer
) -> list[str]:
    """What differs, with the weights in combine or before it."""
    found = []
    with planning(kind, rank, sizes) as plan:
        for weigh_in_combine in in_combine:
            layer = Layer(rank, case, plan, weigh_in_combine=weigh_in_combine)
            found += misplaced_rows(layer, rank) + differences(layer.backward(), answer.for_rank(rank, case))
    return failures_of(case, found)


def every_case() -> list[object]:
    """A case of 64 ranks takes half a second, and one of 256 five: half of the first, and all of the others, are for
    the sweep. So are ids sent to 64 ranks."""

    def is_long(kind: Kind, ranks: int, name: str) -> bool:
        return ranks == 256 or (ranks == 64 and (kind == "by ids" or name in NAMES[1::2]))

    return [
        pytest.param(*case, marks=[pytest.mark.sweep] * is_long(*case)) for case in product(ALL_KINDS, SIZES, NAMES)
    ]


@pytest.mark.parametrize(("kind", "ranks", "name"), every_case())
def test_every_plan_equals_the_dense_layer(rank_threads: RankThreads, kind: Kind, ranks: int, name: str) -> None:
    case, answer = answered(name, ranks)
    assert case.layout.ranks == len(case.experts) == ranks
    turn = NAMES.index(name) % 2 == 0  # at 64 ranks, 0.7 s each
    in_combine = (True, False) if ranks < 64 else (turn,)
    found = rank_threads.run(run_case, ranks, kind, enough(case), in_combine, case, answer, timeout=300)
    assert found == [[]] * ranks
