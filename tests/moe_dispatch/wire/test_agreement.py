"""One check of constant size, once per batch, of what no layer can tell: beliefs that change what is sent."""

import re

import pytest
import torch
import torch.distributed as dist

from moe_dispatch import Partition, TokenSharding, agree
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.ranks import world

RANKS = 3
CPU = torch.device("cpu")


def shards_of(seq: tuple[int, ...]) -> str:
    return f"{TokenSharding(batch=2, seq=Partition(seq))}"


def told(rank: int, facts: list[str], problems: list[str]) -> tuple[str, float]:
    """What ``agree`` says, and a sum over the ranks made after it: the group stays usable."""
    text = ""
    try:
        agree(facts[rank], device=CPU, group=world(), problem=problems[rank])
    except ValueError as error:
        text = str(error)
    ones = torch.ones(())
    dist.all_reduce(ones, group=world())
    return text, ones.item()


def test_the_same_facts_agree(rank_pool: RankPool) -> None:
    assert rank_pool.run(told, RANKS, [shards_of((3, 0, 2))] * RANKS, [""] * RANKS) == [("", 3.0)] * RANKS


@pytest.mark.parametrize("other", [(2, 1, 2), (4, 0, 2), (3, 2, 0)])
def test_a_shard_of_another_size_is_everyones_error(rank_pool: RankPool, other: tuple[int, ...]) -> None:
    facts = [shards_of((3, 0, 2)), shards_of(other), shards_of((3, 0, 2))]
    text = (
        f"the ranks disagree about one call (ranks [0, 2]: {facts[0]}; rank [1]: {facts[1]}); every rank of the "
        "group has to pass the same values"
    )
    assert rank_pool.run(told, RANKS, facts, [""] * RANKS) == [(text, 3.0)] * RANKS


def test_facts_that_differ_after_the_longest_text_are_told_apart(rank_threads: RankThreads) -> None:
    long = "of many pieces, " * 2000
    texts, _ = zip(*rank_threads.run(told, 2, [f"{long}one", f"{long}another"], [""] * 2), strict=True)
    assert texts[0] == texts[1]
    one, another = (re.search(rf"rank \[{rank}\]: of many.*?\.\.\. ([0-9a-f]{{8}})[;)]", texts[0]) for rank in (0, 1))
    assert one is not None
    assert another is not None
    assert one[1] != another[1]


def test_a_problem_of_one_rank_is_everyones_error(rank_pool: RankPool) -> None:
    said = rank_pool.run(told, RANKS, ["the same"] * RANKS, ["", "", "the file has 3 lines"])
    assert said == [("rank 2: the file has 3 lines", 3.0)] * RANKS
