"""Which form a counted plan has: what the rule says is what is sent, and ranks agree about it where they can."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding, dispatch, plan_dispatch
from moe_dispatch.plan.counts.facts import message_bytes
from moe_dispatch.plan.counts.rule import bytes_by_counts, bytes_by_ids, counts_cost_less, first_by_counts
from moe_dispatch.plan.ids.format import IdFormat
from moe_dispatch.testing import RankThreads
from tests.support.dispatch.plans import FORMS, Kind
from tests.support.ranks import world

pytestmark = pytest.mark.usefixtures("uncovered")
TOKENS = 5


def plan_and_dispatch(rank: int, kind: Kind, num_choices: int, num_experts: int) -> tuple[int, int]:
    """Rows that come from others, and that stay. Every choice of a token is on another rank, and all ranks are loaded
    alike."""
    ranks = dist.get_world_size()
    token_t = torch.arange(TOKENS).unsqueeze(1) + rank
    owner_tK = (token_t + torch.arange(num_choices)) % ranks
    experts = Partition.balanced(num_experts, ranks)
    expert_BlK = torch.tensor(experts.offsets)[owner_tK].unsqueeze(0)
    sharding = TokenSharding(batch=1, seq=Partition((TOKENS,) * ranks))
    plan = FORMS[kind](expert_BlK, dim=1, sharding=sharding, experts=experts)
    dispatch(torch.ones(1, TOKENS, 1), torch.ones(expert_BlK.shape), plan)
    return sum(plan.rows_from_others), plan.rows_received[rank]


def bytes_of(rank_threads: RankThreads, kind: Kind, ranks: int, num_choices: int, num_experts: int) -> list[int]:
    """That each rank gets in a plan and its dispatch, as if what stays there came as well."""
    got: list[list[int]] = [[] for _ in range(ranks)]
    exchange = dist.all_to_all_single

    def counted(out: Tensor, *args: Any, **more: Any) -> Any:
        got[dist.get_rank()].append(out.numel() * out.itemsize)
        return exchange(out, *args, **more)

    with mock.patch.object(dist, "all_to_all_single", counted):
        rows = rank_threads.run(plan_and_dispatch, ranks, kind, num_choices, num_experts)
    return [
        of_plan + of_rows // came * (came + own) for (of_plan, of_rows), (came, own) in zip(got, rows, strict=True)
    ]


@pytest.mark.parametrize(
    ("num_choices", "num_experts", "ranks"), [(8, 256, 10), (8, 256, 11), (8, 255, 13), (2, 20, 13)]
)
def test_the_rule_counts_what_is_sent(
    rank_threads: RankThreads, num_choices: int, num_experts: int, ranks: int
) -> None:
    rows = TOKENS * num_choices * (4 + 4 * num_choices)  # of one float32 value and K weights
    message = message_bytes(max(Partition.balanced(num_experts, ranks).sizes))
    dims = num_choices, num_experts
    by_ids = rows + 4 * ranks + TOKENS * bytes_by_ids(ranks, *dims)
    by_counts = rows + message * ranks + TOKENS * bytes_by_counts(ranks, *dims)
    assert bytes_of(rank_threads, "by ids", ranks, *dims) == [by_ids] * ranks
    assert bytes_of(rank_threads, "by counts", ranks, *dims) == [by_counts] * ranks


def test_counts_from_the_number_of_ranks_on_where_they_are_fewer_bytes() -> None:
    for num_choices in (8, 16, 32, 1024):
        for num_experts in (255, 256):
            first, steps = first_by_counts(num_choices, num_experts), IdFormat.of(num_choices, num_experts).steps
            assert first == num_choices + num_choices // steps + 1  # P ids > K (ids + 1), in steps of 4 bytes
            chosen = [counts_cost_less(ranks, num_choices, num_experts) for ranks in range(1, 3 * num_choices)]
            assert chosen == [ranks >= first for ranks in range(1, 3 * num_choices)]
    assert [first_by_counts(k, 64) for k in (1, 2, 7, 8, 9, 16)] == [13, 13, 13, 13, 21, 21]


def test_ranks_that_send_alike_by_ids_are_in_one_form() -> None:
    """So that another K than the peers' is told wherever it was told by ids alone."""
    for num_experts in (200, 300):
        for num_choices in range(2, 70):
            one, other = (IdFormat.of(k, num_experts).steps for k in (num_choices - 1, num_choices))
            if one == other:
                assert first_by_counts(num_choices - 1, num_experts) == first_by_counts(num_choices, num_experts)


def forms_of_plans(ranks: int) -> list[bool]:
    """Whether rows are known at once, for K 2 and 9."""
    known = []
    for num_choices in (2, 9):
        plan = plan_dispatch(
            torch.zeros(1, 1, num_choices, dtype=torch.int64),
            dim=1,
            sharding=TokenSharding(batch=1, seq=Partition((1,) * ranks)),
            experts=Partition((1,) * ranks),
            group=world(),
        )
        known.append(plan.row_index.found is not None)
    return known


def test_a_plan_has_the_form_of_its_number_of_ranks(rank_threads: RankThreads) -> None:
    for ranks, known in ((12, [True, True]), (13, [False, True]), (21, [False, False])):
        assert rank_threads.run(forms_of_plans, ranks, ranks) == [known] * ranks
