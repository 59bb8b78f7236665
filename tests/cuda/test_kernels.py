"""What CUDA's kernels leave as it was, copy to the host, or cannot do."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from moe_dispatch import (
    GroupedExperts,
    Partition,
    StaticSizes,
    TokenSharding,
    combine,
    dispatch,
    plan_static,
)
from tests.support.cuda.device import FakeGpu
from tests.support.cuda.ranks import ends_on_cuda, results_on_cuda
from tests.support.cuda.report import Report
from tests.support.cuda.tried.of_experts import Planning, by_counts, counted, drawn
from tests.support.ranks import world

DIM, HIDDEN = 16, 24


def with_experts(
    gpu: FakeGpu, rows_of_expert: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, GroupedExperts, Report, Report]:
    """The output of experts with so many rows each, and what forward and backward did."""
    torch.manual_seed(0)
    experts = GroupedExperts(len(rows_of_expert), DIM, HIDDEN).to(dtype)
    gpu.module(experts)
    rows = sum(rows_of_expert)
    x_MD = gpu.tensor(torch.randn(rows, DIM).to(dtype).requires_grad_())
    weight_M, rows_e = gpu.tensor(torch.ones(rows)), gpu.tensor(torch.tensor(rows_of_expert))
    with gpu.report() as forward:
        y_MD = experts(x_MD, rows_e, weight_M)
    with gpu.report() as backward:
        y_MD.backward(torch.ones_like(y_MD))
    return gpu.host(y_MD.detach()), experts, forward, backward


@pytest.mark.parametrize(
    ("major", "dtype", "rows_of_expert", "waits"),
    [
        (9, torch.bfloat16, (3, 0, 2), 0),
        (10, torch.bfloat16, (3, 0, 2), 0),
        (8, torch.bfloat16, (3, 0, 2), 1),
        (12, torch.bfloat16, (3, 0, 2), 1),
        (9, torch.float32, (3, 0, 2), 1),
        (9, torch.bfloat16, (0, 0, 0), 0),
        (8, torch.float32, (0, 0, 0), 0),
    ],
)
def test_experts_wait_for_their_counts_only_where_no_kernel_takes_groups(
    major: int, dtype: torch.dtype, rows_of_expert: tuple[int, ...], waits: int
) -> None:
    def case(rank: int, gpu: FakeGpu) -> None:
        _, experts, forward, backward = with_experts(gpu, rows_of_expert, dtype)
        assert (forward.d2h.total(), backward.d2h.total()) == (waits, 0)
        assert not forward.h2d
        for weight in experts.parameters():
            assert weight.grad is not None
            is_zero_e = (gpu.host(weight.grad) == 0).flatten(1).all(1)
            assert is_zero_e.tolist() == [not rows for rows in rows_of_expert]  # NaN where a kernel left it

    for end in ends_on_cuda(case, 1, capability=(major, 0)):
        if end.error is not None:
            raise end.error


def test_a_group_without_tokens_has_plans_of_fixed_sizes() -> None:
    def case(rank: int, gpu: FakeGpu) -> list[int]:
        sharding, experts = TokenSharding(batch=2, seq=Partition((0, 0))), Partition((1, 2))
        ids = gpu.tensor(torch.zeros(2, 0, 3, dtype=torch.int64))
        sizes = StaticSizes(rows_per_pair=2, rows=4)
        plan = plan_static(ids, dim=DIM, sharding=sharding, experts=experts, group=world(), sizes=sizes)
        weight = gpu.tensor(torch.zeros(2, 0, 3))
        x_MD, weight_M = dispatch(gpu.tensor(torch.zeros(2, 0, DIM)), weight, plan)
        assert gpu.host(x_MD).equal(torch.zeros(4, DIM))
        assert not combine(x_MD, plan, weight_M).numel()
        plan.check()
        return gpu.host(plan.token_of_row_M).tolist()

    for end in ends_on_cuda(case, 2):
        if end.error is not None:
            raise end.error
        assert end.result == [-1] * 4


@pytest.mark.parametrize("kind", [counted, by_counts])
def test_the_counts_of_a_plan_go_through_pinned_memory_and_an_event(kind: Callable[[int], Planning]) -> None:
    def case(rank: int, gpu: FakeGpu) -> Report:
        ids, weight, _ = map(gpu.tensor, drawn(rank))
        plan = kind(rank)
        with gpu.report() as report:
            plan(ids, weight)
        return report

    for report in results_on_cuda(case, 1):
        assert [line.split(":")[0] for line in report.d2h] == ["plan/host_copy.py"]
        assert [line.split(":")[0] for line in report.background if "host" in line] == ["plan/host_copy.py"]
