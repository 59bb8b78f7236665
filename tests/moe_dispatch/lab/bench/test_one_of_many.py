"""A plan on one rank of many: the rows that come are those of a rank like this one, and both forms are told."""

import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_dispatch.lab import cli
from moe_dispatch.lab.bench import command
from moe_dispatch.lab.bench.config import PlanOfManyConfig
from moe_dispatch.lab.bench.one_of_many import FORMS, OneOf, OneOfMany, arrives, measure_plans
from moe_dispatch.plan.counts.facts import CountsFacts
from moe_dispatch.testing import RankThreads

MANY = PlanOfManyConfig(name="many", ranks=16, tokens=7, experts=20, top_k=3)


def test_rows_come_as_they_would_from_ranks_like_this_one() -> None:
    many = OneOfMany(MANY)
    with mock.patch.object(dist, "all_to_all_single", arrives):
        plan = FORMS["by counts"].plan(many.ids(), None, many.terms(), OneOf(16))
    assert plan.rows_received == plan.rows_sent
    assert plan.num_rows == 7 * 3
    told_SW = many.told(plan)
    plan.row_index.came([told_SW])
    assert plan.token_of_row_M.sort().values.tolist() == [token for token in range(7) for _ in range(3)]
    assert plan.first_entry_R.diff().min() >= 1  # every row that came has a choice here
    ids, mine = told_SW[:, 1:].view(torch.uint8)[:, :3], CountsFacts.of(many.terms(), 0, 3, torch.device("cpu"))
    assert int((mine.mine_of_id[ids.long()] > 0).sum()) == int((ids < 255).sum()) == 21


def test_the_bytes_of_both_forms_are_formulas() -> None:
    by_ids, by_counts = measure_plans(MANY, 2)[0]
    assert by_ids.forward is not None
    assert by_counts.forward is not None
    assert by_ids.forward.wire_bytes == 15 * (4 + 7 * 4)
    many = OneOfMany(MANY)
    with mock.patch.object(dist, "all_to_all_single", arrives):
        plan = FORMS["by ids"].plan(many.ids(), None, many.terms(), OneOf(16))
    assert by_counts.forward.wire_bytes == 15 * 32 + 8 * sum(plan.rows_away)
    assert all(both == forward for forward, both in zip(by_ids.forward_ms, by_ids.both_ms, strict=True))
    assert all(both > forward for forward, both in zip(by_counts.forward_ms, by_counts.both_ms, strict=True))


def test_the_command_has_a_table_of_plans(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "RankPool", RankThreads)  # which cost no time to start
    assert cli.main(["bench", "bench_tiny", "--repeat", "2", "--workloads", "of many"]) == 0
    out = capsys.readouterr().out
    times = r"( +\d+\.\d \(\d+\.\d\)){3}"
    assert re.search(rf"of many +by ids{times} +0\.00054\n", out)
    assert re.search(rf"\n +by counts{times} +0\.000\d+\n", out)
    assert "of many: one rank of 16, tokens 8 each, E 20, K 2" in out
