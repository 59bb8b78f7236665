"""The table of docs/composing.md, cell by cell."""

from itertools import product
from pathlib import Path

import pytest
import torch

from moe_dispatch.testing import RankPool, RankThreads
from tests.support.compile import untraced
from tests.support.composed.compiled import COMPILED
from tests.support.composed.subjects import LAYOUTS, SUBJECTS, made, shards_of
from tests.support.composed.ways import WAYS, plainly
from tests.support.composed.wrappers import WRAPPERS, placed
from tests.support.ranks import world
from tests.support.source import ROOT
from tests.support.tensors import difference

# Compiled cells take seconds each: most are in the sweep, as are wrappers that are like another one.
QUICK = {
    ("torch.compile, float32", "MoE"),
    ("torch.compile of a checkpointed block", "ulysses_attention"),
}
LIKE_ANOTHER = {"FSDP2, mixed precision, inputs not cast", "FSDP1", "pipeline, GPipe"}
EMPTY = "one rank has nothing"
# Rows whose tests are files of their own.
ELSEWHERE = {
    "torch.save of the module": ["right", "", "right", "right", "", ""],  # test_saved
    "DTensor inputs": ["refused"] * 6,  # test_dtensors
}


def table() -> dict[tuple[str, str], str]:
    lines = (Path(ROOT) / "docs/composing.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (_, *subjects), _, *body = rows
    return {(way, what): cell for way, *cells in body for what, cell in zip(subjects, cells, strict=True)}


def test_the_table_has_every_cell() -> None:
    assert set(table()) == set(product([*WRAPPERS, *COMPILED, *WAYS, *ELSEWHERE], SUBJECTS))
    assert {cell for (way, _), cell in table().items() if way not in ELSEWHERE} == {"right", "graph break"}
    for way, cells in ELSEWHERE.items():
        assert [table()[way, what] for what in SUBJECTS] == cells
    breaks = {what for (way, what), cell in table().items() if cell == "graph break"}
    assert breaks == {"MoE", "dispatch, combine", "attention_over_ranks", "shard_batch"}  # see test_graphs
    assert {way for (way, _), cell in table().items() if cell == "graph break"} == set(COMPILED)


def off_by(rank: int, way: str, what: str, layout: str) -> float:
    x_BlD, pull_BlD = shards_of(LAYOUTS[layout], rank, torch.float64)

    def make() -> torch.nn.Module:
        return made(what, LAYOUTS[layout], world()).to(torch.float64)

    wanted, got = (run(make, x_BlD, pull_BlD) for run in (plainly, WAYS[way]))
    assert got.keys() == wanted.keys()
    return max(difference(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", SUBJECTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_way_to_use_it(rank_threads: RankThreads, way: str, what: str, layout: str, uncovered: None) -> None:
    assert rank_threads.run(off_by, 2, way, what, layout) == [0.0, 0.0]


@untraced()
def wrapped_off_by(rank: int, wrapper: str, what: str, layout: str) -> float:
    with placed(what, layout) as place:
        wanted, got = WRAPPERS[wrapper].wanted(place), WRAPPERS[wrapper].run(place)
    assert got.keys() == wanted.keys()
    return max(difference(got[name].double(), wanted[name].double()) for name in wanted)


def wrapped_cases() -> list[object]:
    return [
        case
        if case[0] not in LIKE_ANOTHER and (case[2] == EMPTY or case[1] == "MoE")
        else pytest.param(*case, marks=pytest.mark.sweep)
        for case in product(WRAPPERS, SUBJECTS, LAYOUTS)
    ]


@pytest.mark.parametrize(("wrapper", "what", "layout"), wrapped_cases())
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_wrapper_around_it(rank_pool: RankPool, wrapper: str, what: str, layout: str) -> None:
    for found in rank_pool.run(wrapped_off_by, 4, wrapper, what, layout):
        assert found <= WRAPPERS[wrapper].tolerance


def compiled_cases() -> list[object]:
    cases = product(COMPILED, SUBJECTS, LAYOUTS)
    return [
        case if case[:2] in QUICK and case[2] == EMPTY else pytest.param(*case, marks=pytest.mark.sweep)
        for case in cases
    ]


def compiled_off_by(rank: int, way: str, what: str, layout: str) -> float:
    return COMPILED[way].off_by(rank, what, layout, difference)


@pytest.mark.parametrize(("way", "what", "layout"), compiled_cases())
def test_compiled(rank_pool: RankPool, way: str, what: str, layout: str) -> None:
    for found in rank_pool.run(compiled_off_by, 2, way, what, layout, timeout=600):
        assert found <= COMPILED[way].tolerance
