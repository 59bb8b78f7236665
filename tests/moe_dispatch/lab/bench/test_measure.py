"""A workload on its ranks: who is refused, who is timed, and in which order."""

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch.lab.bench.config import DispatchConfig
from moe_dispatch.lab.bench.contenders.named import contenders_of
from moe_dispatch.lab.bench.contenders.textbook import TextbookDispatch
from moe_dispatch.lab.bench.measure import Run, measure, order_of_turn, problem_of, time_in_turns
from moe_dispatch.lab.bench.phases import phases_of
from moe_dispatch.lab.bench.workloads.dispatch import DispatchWorkload
from moe_dispatch.testing import RankPool
from tests.support.lab.bench_workloads import ROUTED, TINY
from tests.support.lab.configs import ROOT

ADAPTERS = "tests.support.lab.adapters"


def test_the_textbook_refuses_uneven_shards(rank_pool: RankPool) -> None:
    lines = {line.name: line for line in rank_pool.run(measure, 2, TINY.ulysses[1], "", 1, False)[0][0]}
    assert lines["textbook"].absent == "needs even shards; tokens per rank are (9, 4)"
    assert not lines["textbook"].wrong
    assert len(lines["ours"].both_ms) == 1


def test_turns_multiply_repetitions(rank_pool: RankPool) -> None:
    config = replace(ROUTED, turns=3)
    assert config.shape.endswith("float32, 3 turns a repetition")
    for lines, _ in rank_pool.run(measure, 2, config, "", 2, False):
        assert {len(line.both_ms) for line in lines} == {6}


def turns() -> list[str]:
    called: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def forward(self) -> Tensor:
            called.append(self.name)
            return torch.ones(1)

        def backward(self, out: Tensor) -> None: ...

    times = time_in_turns({name: Noted(name) for name in "abc"}, 3)  # type: ignore[dict-item]
    assert all(len(of_name) == 3 and min(each.both_ms for each in of_name) >= 0 for of_name in times.values())
    return called


def test_contenders_take_turns_and_each_goes_first(rank_pool: RankPool) -> None:
    assert rank_pool.run(turns, 2) == [list("bac") + list("abc") + list("bca") + list("cab")] * 2


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_each_is_in_every_place_and_after_every_other_as_often(count: int) -> None:
    orders = [order_of_turn(turn, count) for turn in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    places = Counter((place, one) for order in orders for place, one in enumerate(order))
    pairs = Counter(pair for order in orders for pair in pairwise(order))
    assert len(places) == count**2
    assert set(places.values()) == {2}
    assert len(pairs) == count * (count - 1)
    assert set(pairs.values()) <= {2}


def profile_layer(rank: int) -> dict[str, float]:
    group, workload = dist.group.WORLD, DispatchWorkload.of(ROUTED)
    assert group is not None
    return phases_of(Run(TextbookDispatch(workload, group), workload.case(rank)))


def test_a_profile_tells_the_exchange_from_the_rest(rank_pool: RankPool) -> None:
    for phases in rank_pool.run(profile_layer, 2):
        assert {"exchange", "gather rows", "sum rows", "sort", "Python and the rest"} < set(phases)
        assert min(phases["exchange"], phases["gather rows"], phases["sum rows"], phases["sort"]) > 0


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ("WithoutGradientOfWeights", r"rank 0: the gradient of input 2 is off by "),
        ("WrongOnTheLastRank", r"rank 1: the output is off by "),
        ("OfAnotherShape", r"rank 0: the output is \(1, 32, 16\), but it has to be \(32, 16\)"),
    ],
)
def test_wrong_results_on_any_rank_are_told_on_every_rank(rank_pool: RankPool, adapter: str, told: str) -> None:
    for lines, _ in rank_pool.run(measure, 2, TINY.dispatch[0], f"{ADAPTERS}:{adapter}", 1, False):
        (refused,) = [line for line in lines if line.name == adapter]
        assert refused.wrong
        assert re.match(told, refused.absent)
        assert not refused.both_ms


def documented_adapter(config: DispatchConfig) -> str:
    """What is wrong with the adapter that docs/bench.md shows."""
    group = dist.group.WORLD
    assert group is not None
    names: dict[str, Any] = {}
    page = (ROOT / "docs" / "bench.md").read_text()
    exec("from moe_dispatch import combine, dispatch, plan_dispatch", names)
    exec(next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Name" in block), names)
    workload = DispatchWorkload.of(config)
    return problem_of(Run(names["Name"](workload, group), workload.case(group.rank())), workload.dtype)


def test_the_adapter_of_the_documentation_is_right(rank_pool: RankPool) -> None:
    assert rank_pool.run(documented_adapter, 2, ROUTED) == ["", ""]


def test_an_adapter_of_attention_is_timed_with_attention_only() -> None:
    adapter = f"{ADAPTERS}:CarefulUlysses"
    assert list(contenders_of("ulysses", adapter)) == ["ours", "textbook", "CarefulUlysses"]
    assert list(contenders_of("dispatch", adapter)) == ["ours", "experts weigh", "textbook"]
