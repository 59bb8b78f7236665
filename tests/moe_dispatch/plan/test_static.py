"""A plan of fixed sizes moves the same rows as one of counted sizes, bit for bit, and waits for nothing.

Sizes are the smallest that are enough, one row too few, and with room to spare.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dispatch import (
    DispatchMetadata,
    GroupedExperts,
    Partition,
    StaticPlan,
    StaticSizes,
    TokenSharding,
    combine,
    dispatch,
    plan_dispatch,
    plan_static,
)
from moe_dispatch.testing import RankPool, RankThreads
from moe_dispatch.testing.counting import counting, run_backward
from tests.support.dispatch.dense import Case, make_cases, through_experts
from tests.support.dispatch.plans import crowded, enough, sharding_of
from tests.support.ranks import world


class Layer:
    """One forward of this rank with experts y = tanh(x @ w) + 1, so that a row of zeros is no zero."""

    def __init__(self, rank: int, case: Case, sizes: StaticSizes | None, dtype: torch.dtype = torch.float64) -> None:
        layout = case.layout
        self.x_BlD = layout.cut(case.x_BLD)[rank].to(dtype).requires_grad_()
        self.weight_BlK = layout.cut(torch.rand(case.expert_BLK.shape, generator=torch.Generator().manual_seed(1)))[
            rank
        ]
        self.weight_BlK = self.weight_BlK.clone().requires_grad_()
        self.w_eDF = case.w_EDF.split(case.experts)[rank].to(dtype).requires_grad_()
        self.gain_F = torch.ones(case.w_EDF.shape[2], dtype=dtype, requires_grad=True)
        sharding = sharding_of(layout)
        ids, dim, experts = layout.cut(case.expert_BLK)[rank], case.x_BLD.shape[2], Partition(case.experts)
        if sizes is None:
            self.plan: DispatchMetadata = plan_dispatch(
                ids, dim=dim, sharding=sharding, experts=experts, group=world()
            )
        else:
            self.plan = plan_static(ids, dim=dim, sharding=sharding, experts=experts, group=world(), sizes=sizes)
        self.x_MD, self.weight_M = dispatch(self.x_BlD, self.weight_BlK, self.plan)
        counts = self.plan.rows_per_expert_e.tolist()
        counts_and_rest = [*counts, len(self.x_MD) - sum(counts)]
        w_and_zero = torch.cat([self.w_eDF, self.w_eDF.new_zeros(1, *self.w_eDF.shape[1:])])
        self.num_used = sum(counts)
        self.y_MF = (through_experts(self.x_MD, w_and_zero, counts_and_rest) + 1) * self.gain_F
        self.out_BlF = combine(self.y_MF, self.plan, self.weight_M) + combine(self.y_MF, self.plan)
        self.grad_BlF = layout.cut(case.grad_BLF)[rank].to(dtype)

    @property
    def used(self) -> dict[str, Tensor]:
        """What has to be equal, bit for bit."""
        inputs = {"x": self.x_BlD, "weight": self.weight_BlK, "w": self.w_eDF, "gain": self.gain_F}
        grads = torch.autograd.grad(self.out_BlF, list(inputs.values()), self.grad_BlF, materialize_grads=True)
        rows = {"x_MD": self.x_MD, "weight_M": self.weight_M, "tokens": self.plan.token_of_row_M}
        return {
            **{name: rows_M[: self.num_used] for name, rows_M in rows.items()},
            "choices": self.plan.choice_of_row_M[: self.num_used],
            "rows_per_expert_e": self.plan.rows_per_expert_e,
            "out": self.out_BlF,
            **{f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)},
        }


def differences(rank: int, cases: list[tuple[Case, StaticSizes]], dtype: torch.dtype) -> list[str]:
    failures = []
    for case, sizes in cases:
        counted, fixed = Layer(rank, case, None, dtype), Layer(rank, case, sizes, dtype)
        assert isinstance(fixed.plan, StaticPlan)
        fixed.plan.check()
        unused_MD, unused_M = fixed.x_MD[fixed.num_used :], fixed.weight_M[fixed.num_used :]
        wanted = counted.used
        # sums over all rows of a matrix product with zeros at the end may be added up in another order
        close = {"gradient of gain"} if sizes.rows > counted.num_used else set()
        facts = {
            name: torch.equal(got, wanted[name])
            if name not in close
            else torch.allclose(got, wanted[name], rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
            for name, got in fixed.used.items()
        }
        facts |= {
            "sizes": len(fixed.x_MD) == sizes.rows and set(fixed.plan.rows_sent) == {sizes.rows_per_pair},
            "unused rows are zeros": not (unused_MD.any() or unused_M.any()),
            "unused tokens": bool((fixed.plan.token_of_row_M[fixed.num_used :] == -1).all()),
        }
        failures += [f"{name}: {case.name}, {sizes}" for name, right in facts.items() if not right]
    return failures


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_same_rows_and_sums_as_a_counted_plan(rank_threads: RankThreads, ranks: int, dtype: torch.dtype) -> None:
    torch.manual_seed(30 + ranks)
    cases = []
    drawn = make_cases(ranks)[::5]  # K takes turns of 3
    assert {case.expert_BLK.shape[2] for case in drawn} == {1, 2, 4}
    for i, case in enumerate(drawn):
        sizes, more = enough(case), (0, 1, 40)[i % 3]
        cases.append((case, StaticSizes(rows_per_pair=sizes.rows_per_pair + more, rows=sizes.rows + more)))
    for failures in rank_threads.run(differences, ranks, cases, dtype):
        assert failures == []


# ---- nothing waits, nothing depends on the ids -----------------------------------------------------------


class Copies(TorchDispatchMode):
    """Names of the operations by which a number of the host would be copied to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::scalar_tensor", "aten::lift_fresh") or func.name().startswith("aten::where.Scalar"):
            self.found.append(func.name())
        return func(*args, **kwargs or {})


def copies_to_the_device(rank: int) -> tuple[list[str], list[str]]:
    """Those of a layer after the first, and those of a where with a number and of a list, which have to be seen."""
    case, sizes = crowded(4, 3), StaticSizes(rows_per_pair=10, rows=60)
    x_BlD = case.layout.cut(case.x_BLD)[rank].requires_grad_()
    weight_BlK = torch.ones(*x_BlD.shape[:2], 3, requires_grad=True)
    ids_BlK = case.layout.cut(case.expert_BLK)[rank]
    sharding = TokenSharding(batch=2, seq=Partition(case.layout.seq))
    experts = Partition(case.experts)

    def layer() -> None:
        plan = plan_static(
            ids_BlK, dim=4, sharding=sharding, experts=experts, group=world(), sizes=sizes, weight_BlK=weight_BlK
        )
        x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
        combine(x_MD, plan, weight_M).sum().backward()

    layer()
    with Copies() as copies:
        layer()
    with Copies() as seen:
        torch.where(ids_BlK > 0, ids_BlK, 0)
        torch.tensor([1, 2])
    return copies.found, seen.found


def test_a_layer_copies_nothing_to_the_device(rank_pool: RankPool) -> None:
    for found, seen in rank_pool.run(copies_to_the_device, 4):
        assert found == []
        assert len(seen) == 2


def syncs_and_shapes(rank: int, seed: int) -> tuple[list[str], list[str], list[tuple[int, ...]]]:
    case, sizes = crowded(4, seed), StaticSizes(rows_per_pair=10, rows=60)
    x_BlD = case.layout.cut(case.x_BLD)[rank].requires_grad_()
    weight_BlK = torch.ones(*x_BlD.shape[:2], 3, requires_grad=True)
    sharding = TokenSharding(batch=2, seq=Partition(case.layout.seq))
    with counting() as counts:
        plan = plan_static(
            case.layout.cut(case.expert_BLK)[rank],
            dim=4,
            sharding=sharding,
            experts=Partition(case.experts),
            group=world(),
            sizes=sizes,
            weight_BlK=weight_BlK,
        )
        x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
        y_BlD = combine(x_MD, plan, weight_M)
    with counting() as backward:
        run_backward(y_BlD, torch.ones_like(y_BlD))
    tensors = [
        getattr(plan, name) for name in ("token_of_row_M", "sent_of_entry_S", "first_entry_t", "first_entry_R")
    ]
    shapes = [tuple(x.shape) for x in (*tensors, x_MD, weight_M)]
    return counts.host_syncs + backward.host_syncs, counts.collectives + backward.collectives, shapes


def test_nothing_waits_for_the_device_and_no_size_depends_on_the_ids(rank_pool: RankPool) -> None:
    runs = [rank_pool.run(syncs_and_shapes, 4, seed) for seed in (1, 2)]
    for of_rank, again in zip(*runs, strict=True):
        syncs, collectives, shapes = of_rank
        assert syncs == []
        assert collectives == ["c10d::alltoall_base_"] * 5
        assert shapes == again[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_experts_leave_unused_rows_out_of_their_gradients(dtype: torch.dtype) -> None:
    """By grouped products and by a loop: 5 used rows of 9."""
    torch.manual_seed(0)
    experts = GroupedExperts(3, 16, 32).to(dtype)
    rows_e, x_MD, weight_M = torch.tensor([2, 0, 3]), torch.randn(9, 16, dtype=dtype), torch.rand(9)
    results = []
    for rows in (5, 9):
        y_MD = experts(x_MD[:rows], rows_e, weight_M[:rows])
        results.append([y_MD[:5], *torch.autograd.grad(y_MD[:5].sum(), list(experts.parameters()))])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)
