"""dispatch, experts and combine equal the dense layer: outputs and every gradient on every rank, to 1e-12.

The whole of a case is the same on every rank; ranks cut their share out of it by slicing (tests/support), run the
layer, and say what differs from their share of the dense answer.
"""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import DispatchMetadata, TokenSharding, plan_dispatch
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.dense import (
    Answer,
    Case,
    chosen_weights,
    dense_answer,
    differences,
    make_case,
    make_cases,
)
from tests.support.dispatch.layer import MEMORIES, Layer, failures_of, misplaced, rows_of_rank
from tests.support.dispatch.layouts import EXPERTS, Layout, Order, layouts
from tests.support.dispatch.routings import ROUTINGS

pytestmark = pytest.mark.usefixtures("uncovered")


def turns(i: int) -> tuple[str, bool]:
    """Memory of the inputs, and whether combine weighs, of case i: slower than experts and K take turns."""
    return list(MEMORIES)[i // 4 % 4], i // 3 % 2 == 0


def run_cases(rank: int, cases: list[tuple[Case, Answer]]) -> list[str]:
    """Every case, with the memory of the inputs and the place of the weights taking turns."""
    failures = []
    for i, (case, answer) in enumerate(cases):
        memory_name, weigh_in_combine = turns(i)
        try:
            layer = Layer(rank, case, memory=MEMORIES[memory_name], weigh_in_combine=weigh_in_combine)
            found = misplaced(layer, rank) + differences(layer.backward(), answer.for_rank(rank, case))
        except Exception as error:
            error.add_note(f"in case {case.name}, memory {memory_name}")
            raise
        failures += failures_of(case, [f"{what} ({memory_name})" for what in found])
    return failures


def run_two_at_once(rank: int, cases: list[tuple[Case, Answer]], last_first: bool) -> list[str]:
    """All forwards, then all backwards."""
    layers = [(Layer(rank, case), case, answer) for case, answer in cases]
    order = reversed(layers) if last_first else layers
    return [
        failure
        for layer, case, answer in order
        for failure in failures_of(case, differences(layer.backward(), answer.for_rank(rank, case)))
    ]


def run_permuted_choices(rank: int, case: Case, answer: Answer) -> list[str]:
    """The K axis in every other order: the same layer, and gradients of the weights permuted alike."""
    failures = []
    for order in ([2, 0, 1], [2, 1, 0], [1, 0, 2]):
        permuted = dataclasses.replace(case, expert_BLK=case.expert_BLK[..., order])
        wanted = dataclasses.replace(answer, weight=answer.weight[..., order]).for_rank(rank, case)
        failures += failures_of(permuted, differences(Layer(rank, permuted).backward(), wanted))
    return failures


def one_number(t_BlD: Tensor) -> Tensor:
    """All of it the first element, in the memory of one."""
    return t_BlD[:1, :1, :1].expand(t_BlD.shape)


def run_expanded(rank: int, case: Case, answer: Answer) -> list[str]:
    """Inputs and the gradient of the output are one number each; so their gradients are sums, in one place."""
    got, wanted = Layer(rank, case, memory=one_number).backward(), answer.for_rank(rank, case)
    got, wanted = (
        dataclasses.replace(a, x=a.x.sum(), weight=a.weight.sum(), logits=torch.zeros(())) for a in (got, wanted)
    )
    return differences(got, wanted)


def run_selections(rank: int, groups: list[list[int]], cases: list[tuple[Case, Answer]]) -> list[str]:
    """Each EP group is part of the mesh, holds all experts once, and sees its own tokens only."""
    made = [dist.new_group(ranks) for ranks in groups]
    number = next(i for i, ranks in enumerate(groups) if rank in ranks)
    group, (case, answer) = made[number], cases[number]
    assert isinstance(group, dist.ProcessGroup)

    def planning(expert_BlK: Tensor, *, sharding: TokenSharding, **given: Any) -> DispatchMetadata:
        return plan_dispatch(expert_BlK, sharding=sharding.select(groups[number]), group=group, **given)

    layer = Layer(rank, case, planning, group_rank=group.rank())
    found = differences(layer.backward(), answer.for_rank(rank, case, group.rank()))
    if layer.plan.token_of_row_M.tolist() != [token for _, token, _ in rows_of_rank(case, group.rank())]:
        found.append("token_of_row_M")
    dist.destroy_process_group(group)
    return found


def run_with_poison(rank: int, case: Case, answer: Answer) -> list[str]:
    """As the dense layer without poison; the poisoned tokens, which no expert sees, give exact zeros."""
    got = Layer(rank, case).backward()
    unseen_Bl = case.layout.cut((case.expert_BLK < 0).all(-1))[rank]
    zeros = [name for name, t in (("y", got.y), ("x", got.x)) if t[unseen_Bl].count_nonzero()]
    return differences(got, answer.for_rank(rank, case)) + zeros


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_outputs_and_gradients_equal_the_dense_layer(rank_threads: RankThreads, ranks: int) -> None:
    torch.manual_seed(ranks)
    cases = [(case, dense_answer(case)) for case in make_cases(ranks)]
    assert len(cases) >= 180
    met = {(turns(i), case.expert_BLK.shape[2], case.experts) for i, (case, _) in enumerate(cases)}
    assert len({(weigh, num_choices) for (_, weigh), num_choices, _ in met}) == 2 * 3
    assert len({(memory, experts) for (memory, _), _, experts in met}) == 4 * len(EXPERTS[ranks])
    for failures in rank_threads.run(run_cases, ranks, cases):
        assert failures == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_another_shape_every_time(rank_pool: RankPool, ranks: int) -> None:
    """20 random shapes in a row on the same ranks and group: nothing is left over from the last."""
    torch.manual_seed(20 + ranks)
    cases = []
    for i in range(20):
        seq = tuple(torch.randint(0, 6, (ranks,)).tolist())
        layout = Layout(batch=(1 + i % 3,), seq=seq, order=("BL", "LB")[i % 2])
        routing = list(ROUTINGS)[i % len(ROUTINGS)]
        case = make_case(layout, routing, experts=EXPERTS[ranks][0], num_choices=1 + i % 3, dim=1 + i, width=1 + i)
        cases.append((case, dense_answer(case)))
    for failures in rank_pool.run(run_cases, ranks, cases):
        assert failures == []


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_two_forwards_before_the_backwards(rank_pool: RankPool, ranks: int, last_first: bool) -> None:
    torch.manual_seed(40 + ranks)
    first, second, experts = layouts(ranks)[0], layouts(ranks)[3], EXPERTS[ranks]
    made = [
        make_case(first, "uniform", experts=experts[0], num_choices=2, dim=7, width=7),
        make_case(second, "holes", experts=experts[1], num_choices=3, dim=5, width=4),
    ]
    cases = [(case, dense_answer(case)) for case in made]
    for failures in rank_pool.run(run_two_at_once, ranks, cases, last_first):
        assert failures == []


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_order_of_the_choices_does_not_matter(rank_threads: RankThreads, ranks: int) -> None:
    torch.manual_seed(50)
    case = make_case(layouts(ranks)[0], "holes", experts=EXPERTS[ranks][0], num_choices=3, dim=8, width=8)
    for failures in rank_threads.run(run_permuted_choices, ranks, case, dense_answer(case)):
        assert failures == []


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_expanded_inputs_and_gradients(rank_threads: RankThreads, ranks: int) -> None:
    torch.manual_seed(60)
    case = make_case(layouts(ranks)[0], "one_expert", experts=EXPERTS[ranks][0], num_choices=2, dim=7, width=5)
    x_BLD, logits_BLE, grad_BLF = (one_number(t).clone() for t in (case.x_BLD, case.logits_BLE, case.grad_BLF))
    case = dataclasses.replace(case, x_BLD=x_BLD, logits_BLE=logits_BLE, grad_BLF=grad_BLF)
    for failures in rank_threads.run(run_expanded, ranks, case, dense_answer(case)):
        assert failures == []


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_weight_of_zero_keeps_its_gradient(rank_threads: RankThreads, ranks: int) -> None:
    torch.manual_seed(65)
    case = make_case(layouts(ranks)[0], "duplicates", experts=EXPERTS[ranks][0], num_choices=2, dim=7, width=7)
    case.logits_BLE[..., ::2] = -1000.0
    answer = dense_answer(case)
    zero_BLK = chosen_weights(case.logits_BLE, case.expert_BLK) == 0
    assert answer.weight[zero_BLK].count_nonzero() == zero_BLK.sum() > 0
    for failures in rank_threads.run(run_cases, ranks, [(case, answer)]):
        assert failures == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_tokens_without_experts_cannot_poison_others(rank_threads: RankThreads, ranks: int) -> None:
    torch.manual_seed(70)
    case = make_case(layouts(ranks)[0], "uniform", experts=EXPERTS[ranks][0], num_choices=2, dim=7, width=7)
    case.expert_BLK[torch.rand(case.layout.grid) < 0.5] = -1
    unseen_BL = (case.expert_BLK < 0).all(-1)
    assert 0 < unseen_BL.sum() < unseen_BL.numel()
    answer = dense_answer(case)
    case.x_BLD[unseen_BL] = torch.nan
    for failures in rank_threads.run(run_with_poison, ranks, case, answer):
        assert failures == []


@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[0, 2], [1, 3]]])
@pytest.mark.parametrize("order", ["BL", "LB"])
def test_expert_groups_that_are_part_of_the_mesh(rank_pool: RankPool, order: Order, groups: list[list[int]]) -> None:
    """(dp, sp) is 2 x 2. The experts live twice; each copy's gradient is that of its group's tokens."""
    torch.manual_seed(80)
    layout = Layout(batch=(2, 1), seq=(3, 2), order=order)
    whole = make_case(layout, "uniform", experts=(2, 3), num_choices=2, dim=7, width=5)
    cases = []
    for ranks in groups:
        own = dataclasses.replace(whole, expert_BLK=whole.expert_BLK.clone())
        for other in set(range(4)) - set(ranks):
            layout.cut(own.expert_BLK)[other].fill_(-1)
        cases.append((own, dense_answer(own)))
    for failures in rank_pool.run(run_selections, 4, groups, cases):
        assert failures == []
