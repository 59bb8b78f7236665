"""A sharding asked of the group: each rank knows its own number of tokens."""

from typing import Any

import pytest
import torch

from moe_dispatch import Partition, RankMistakeError, TokenSharding, gather_sharding
from moe_dispatch.testing import RankThreads
from tests.support.ranks import world

CPU = torch.device("cpu")
RULE = "it has to be an int of at least 0"


def asked(rank: int, counts: tuple[int, ...]) -> TokenSharding:
    return gather_sharding(counts[rank], device=CPU, group=world())


def refused(rank: int, wrong: Any) -> tuple[str, tuple[int, ...], TokenSharding]:
    """What is told and of which rank, where rank 1 has something wrong; and what the group gives afterwards."""
    with pytest.raises(RankMistakeError) as error:
        gather_sharding(wrong if rank == 1 else 4, device=CPU, group=world())
    return str(error.value), error.value.ranks, gather_sharding(rank, device=CPU, group=world())


@pytest.mark.parametrize("counts", [(10, 3, 0), (0, 0), (7,), (0, 2**31 + 5), (1,) * 16])
def test_tokens_of_all_ranks_are_one_row(counts: tuple[int, ...], rank_threads: RankThreads) -> None:
    shardings = rank_threads.run(asked, len(counts), counts)
    for rank, sharding in enumerate(shardings):
        assert sharding == TokenSharding(batch=1, seq=Partition(counts))
        assert sharding.local_shape(rank) == (1, counts[rank])
        assert sharding.global_shape == (1, sum(counts))


@pytest.mark.parametrize("wrong", [-1, 2.0, True, None, torch.tensor(3)])
def test_a_number_that_is_none_is_everyones_error(wrong: Any, rank_threads: RankThreads) -> None:
    text = f"rank 1: num_tokens is {wrong!r}; {RULE}"
    after = TokenSharding(batch=1, seq=Partition((0, 1, 2)))
    assert rank_threads.run(refused, 3, wrong) == [(text, (1,), after)] * 3


def test_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match="group is None; pass the process group explicitly"):
        gather_sharding(3, device=CPU, group=None)  # type: ignore[arg-type]
