"""The same bits: in a second run, for any sharding, on any rank; and nothing that was passed in changes."""

import dataclasses

import pytest
import torch
from torch import Tensor

from moe_dispatch import (
    Partition,
    combine,
    dispatch,
    plan_dispatch,
)
from moe_dispatch.testing import RankThreads
from tests.support.dispatch.dense import (
    Case,
    chosen_weights,
    make_case,
    rows_in_order,
)
from tests.support.dispatch.layer import Layer
from tests.support.dispatch.layouts import EXPERTS, Layout, Order, layouts
from tests.support.dispatch.plans import sharding_of
from tests.support.dispatch.routings import ROUTINGS
from tests.support.ranks import world


def expert_inputs(rank: int, case: Case) -> tuple[Tensor, ...]:
    layer = Layer(rank, case)
    plan = layer.plan
    rows = (layer.x_MD, layer.weight_M, plan.token_of_row_M, plan.choice_of_row_M, plan.rows_per_expert_e)
    return tuple(t.detach() for t in rows)


def run_twice(rank: int, cases: list[Case]) -> list[str]:
    """Same bits again."""
    failures = []
    for case in cases:
        first, second = (dataclasses.astuple(Layer(rank, case).backward()) for _ in range(2))
        if not all(a.equal(b) for a, b in zip(first, second, strict=True)):
            failures.append(case.name)
    return failures


def changed_inputs(rank: int, case: Case) -> list[str]:
    """Which of the tensors that were passed in, or of the plan's, do not hold what they held."""
    layer = Layer(rank, case)
    plan, expert_BlK = layer.plan, case.layout.cut(case.expert_BLK)[rank]
    named = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    named |= {"x": layer.x_BlD, "w": layer.weight_BlK, "y": layer.experts(layer.x_MD), "weight_M": layer.weight_M}
    named |= {"ids": expert_BlK}
    passed = {name: t.detach() for name, t in named.items() if isinstance(t, Tensor)}
    before = {name: t.clone() for name, t in passed.items()}
    plan_dispatch(expert_BlK, dim=3, sharding=plan.sharding, experts=plan.experts, group=world())
    dispatch(layer.x_BlD, layer.weight_BlK, plan)
    combine(passed["y"], plan, passed["weight_M"])
    layer.backward()
    return [name for name, t in passed.items() if not t.equal(before[name])]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_second_run_gives_the_same_bits(rank_threads: RankThreads, ranks: int) -> None:
    torch.manual_seed(90)
    cases = [
        make_case(layouts(ranks)[0], routing, experts=EXPERTS[ranks][0], num_choices=4, dim=7, width=7)
        for routing in ROUTINGS
    ]
    assert rank_threads.run(run_twice, ranks, cases) == [[]] * ranks


@pytest.mark.parametrize("order", ["BL", "LB"])
def test_experts_see_the_same_rows_for_any_sharding(rank_threads: RankThreads, order: Order) -> None:
    """Every rank's rows, one rank after another, are the same bits for any number of ranks and any cut."""
    torch.manual_seed(100)
    one = Layout(batch=(3,), seq=(5,), order=order)
    case = make_case(one, "holes", experts=(6,), num_choices=3, dim=7, width=7)
    rows = rows_in_order(case.expert_BLK.flatten(0, 1))
    token_M, choice_M = (torch.tensor([row[i] for row in rows]) for i in (1, 2))
    weight_TK = chosen_weights(case.logits_BLE, case.expert_BLK).flatten(0, 1)
    rows_E = torch.tensor([sum(row[0] == expert for row in rows) for expert in range(6)])
    wanted = (case.x_BLD.flatten(0, 1)[token_M], weight_TK[token_M, choice_M], token_M, choice_M, rows_E)
    cuts = [((3,), (5,)), ((3,), (2, 3)), ((0, 3), (5,)), ((3,), (1, 0, 4)), ((2, 1), (4, 1)), ((1, 0, 1, 1), (5,))]
    experts = [(6,), (6, 0), (1, 5), (2, 0, 4), (1, 2, 3, 0), (0, 0, 3, 3)]
    for (batch, seq), sizes in zip(cuts, experts, strict=True):
        cut = dataclasses.replace(case, layout=Layout(batch=batch, seq=seq, order=order), experts=sizes)
        by_rank = rank_threads.run(expert_inputs, cut.layout.ranks, cut)
        for got, want in zip(map(torch.cat, zip(*by_rank, strict=True)), wanted, strict=True):
            assert got.equal(want), (batch, seq, sizes)


def combined(rank: int, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of this rank, their outputs and the gradients of their inputs, for experts that are the identity."""
    sharding = sharding_of(case.layout)
    x_BlD = case.layout.cut(case.x_BLD)[rank].to(dtype).requires_grad_()
    plan = plan_dispatch(
        case.layout.cut(case.expert_BLK)[rank],
        dim=x_BlD.shape[2],
        sharding=sharding,
        experts=Partition(case.experts),
        group=world(),
    )
    weight_BlK = chosen_weights(case.layout.cut(case.logits_BLE)[rank], case.layout.cut(case.expert_BLK)[rank])
    x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
    y_BlD = combine(x_MD.sin(), plan, weight_M)
    (grad_BlD,) = torch.autograd.grad(y_BlD, x_BlD, case.layout.cut(case.grad_BLF)[rank].to(dtype))
    return sharding.tokens(rank), y_BlD.detach().flatten(0, 1), grad_BlD.flatten(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["BL", "LB"])
def test_a_token_has_the_same_bits_on_any_rank(rank_threads: RankThreads, order: Order, dtype: torch.dtype) -> None:
    """Sums run over ranks in their order, not over this rank last, though its rows do not travel."""
    torch.manual_seed(101)
    cuts = [((3,), (7, 0, 0)), ((3,), (0, 0, 7)), ((3,), (2, 4, 1)), ((1, 2, 0), (7,))]
    first = make_case(
        Layout(batch=(3,), seq=(7, 0, 0), order=order), "uniform", experts=(2, 3, 1), num_choices=6, dim=8, width=8
    )
    found = []
    for batch, seq in cuts:
        case = dataclasses.replace(first, layout=Layout(batch=batch, seq=seq, order=order))
        token_T, *rows = map(torch.cat, zip(*rank_threads.run(combined, 3, case, dtype), strict=True))
        found.append([of_rank_TD[token_T.argsort()] for of_rank_TD in rows])
    for got in found[1:]:
        assert all(map(torch.equal, got, found[0]))


@pytest.mark.parametrize("ranks", [1, 3])
def test_inputs_and_the_plan_are_left_as_they_were(rank_threads: RankThreads, ranks: int) -> None:
    torch.manual_seed(110)
    case = make_case(layouts(ranks)[0], "holes", experts=EXPERTS[ranks][0], num_choices=2, dim=7, width=7)
    assert rank_threads.run(changed_inputs, ranks, case) == [[]] * ranks
