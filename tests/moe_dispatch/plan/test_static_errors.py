"""A plan of fixed sizes that does not hold is told on every rank, and all outputs are NaN."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moe_dispatch import (
    Partition,
    RankMistakeError,
    StaticPlan,
    StaticSizes,
    TokenSharding,
    combine,
    dispatch,
    plan_static,
)
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.plans import crowded, enough
from tests.support.ranks import refusal, world


def told(rank: int, change: Callable[[int, dict[str, object]], None], sizes: StaticSizes) -> tuple[str, set[bool]]:
    """What ``check`` says, and whether outputs are NaN."""
    case = crowded(3, 5)
    sharding = TokenSharding(batch=2, seq=Partition(case.layout.seq))
    arguments: dict[str, object] = {
        "expert_BlK": case.layout.cut(case.expert_BLK)[rank].clone(),
        "weight_BlK": torch.ones(*sharding.local_shape(rank), 3),
        "sizes": sizes,
        "experts": Partition(case.experts),
        "dtype": torch.float64,
    }
    change(rank, arguments)
    plan = plan_static(dim=4, sharding=sharding, group=world(), **arguments)  # type: ignore[arg-type]
    x_MD, weight_M = dispatch(case.layout.cut(case.x_BLD)[rank], arguments["weight_BlK"], plan)  # type: ignore[arg-type]
    nan = set(combine(x_MD, plan, weight_M).isnan().flatten().tolist())
    try:
        plan.check()
    except ValueError as error:
        return str(error), nan
    return "", nan


def nothing(rank: int, arguments: dict[str, object]) -> None: ...


def id_outside(rank: int, arguments: dict[str, object]) -> None:
    if rank == 2:
        arguments["expert_BlK"][0, 0, 0] = 3  # type: ignore[index]


def nan_weight(rank: int, arguments: dict[str, object]) -> None:
    if rank == 0:
        arguments["weight_BlK"][0, 0, 0] = torch.nan  # type: ignore[index]


def other_dtype(rank: int, arguments: dict[str, object]) -> None:
    if rank == 1:
        arguments["dtype"] = torch.float32


def other_rows(rank: int, arguments: dict[str, object]) -> None:
    if rank == 1:
        arguments["sizes"] = StaticSizes(rows_per_pair=10, rows=61)


ROOM = StaticSizes(rows_per_pair=10, rows=60)
TOLD = {
    "fits": (nothing, ROOM, ""),
    "id outside": (id_outside, ROOM, "rank 2 has expert ids out of range or NaN weights"),
    "NaN weight": (nan_weight, ROOM, "rank 0 has expert ids out of range or NaN weights"),
    "other dtype": (other_dtype, ROOM, "ranks 0 and 1 disagree about K, dim, dtype, sizes, sharding or experts"),
    "other rows": (other_rows, ROOM, "ranks 0 and 1 disagree about K, dim, dtype, sizes, sharding or experts"),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_problem_is_told_on_every_rank_and_makes_all_outputs_nan(rank_threads: RankThreads, name: str) -> None:
    change, sizes, text = TOLD[name]
    for said, nan in rank_threads.run(told, 3, change, sizes):
        assert said == (text and f"a plan of fixed sizes did not hold, and its outputs are NaN: {text}")
        assert nan <= {bool(text)}  # a rank without tokens has no outputs


@pytest.mark.parametrize("short", ["rows_per_pair", "rows"])
def test_too_few_rows_are_told_on_every_rank(rank_threads: RankThreads, short: str) -> None:
    fits = enough(crowded(3, 5))
    for said, nan in rank_threads.run(told, 3, nothing, fits):
        assert (said, nan - {False}) == ("", set())
    needed = getattr(fits, short)
    for fewer in (needed - 1, 1):
        results = rank_threads.run(told, 3, nothing, replace(fits, **{short: fewer}))
        assert len({said for said, _ in results}) == 1
        for said, nan in results:
            assert said.split(": ")[1].startswith(f"{needed} ")
            assert f"but {short} is {fewer}; plan with more" in said
            assert nan <= {True}


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"rows_per_pair": 0, "rows": 1}, "rows_per_pair is 0; it has to be an int of at least 1"),
        ({"rows_per_pair": 1, "rows": 0}, "rows is 0; it has to be an int of at least 1"),
    ],
)
def test_sizes_that_hold_nothing_are_refused(sizes: dict[str, int], text: str) -> None:
    assert refusal(lambda: StaticSizes(**sizes)) == text


def plan_with_wrong_ids(rank: int) -> tuple[str, tuple[int, ...]]:
    """Rank 1 passes ids of another dtype: what each rank is told, and whom it blames. The group stays usable."""
    sharding = TokenSharding(batch=1, seq=Partition((2, 1, 0)))
    sizes = StaticSizes(rows_per_pair=2, rows=3)
    ids_BlK = torch.zeros(*sharding.local_shape(rank), 1, dtype=torch.int64)

    def plan(ids_BlK: torch.Tensor) -> StaticPlan:
        experts = Partition((1, 0, 1))
        return plan_static(ids_BlK, dim=1, sharding=sharding, experts=experts, group=world(), sizes=sizes)

    with pytest.raises(RankMistakeError) as raised:
        plan(ids_BlK.short() if rank == 1 else ids_BlK)
    plan(ids_BlK).check()
    return str(raised.value), raised.value.ranks


def test_arguments_of_one_rank_are_everyones_error(rank_pool: RankPool) -> None:
    """The others would wait for its rows for ever."""
    for text, ranks in rank_pool.run(plan_with_wrong_ids, 3):
        assert text == (
            "rank 1: expert ids are torch.int16; they have to be a torch.int64 or torch.int32 tensor, e.g. "
            "scores.topk(K).indices"
        )
        assert ranks == (1,)
