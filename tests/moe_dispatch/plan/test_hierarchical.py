"""Dispatch in two steps equals dispatch in one: the rows bit for bit, outputs and gradients as in the dense layer.

4 ranks are 2 nodes of 2, sometimes 4 of 1 or 1 of 4. Each rank cuts its share of a case by slicing (tests/support).
"""

import dataclasses
import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import (
    NodeGroups,
    Partition,
    TokenSharding,
    combine,
    dispatch,
    plan_hierarchical,
)
from moe_dispatch.plan.ids.group_tokens import GroupTokens
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.dense import (
    Answer,
    Case,
    chosen_weights,
    dense_answer,
    differences,
    make_case,
    make_cases,
    rank_of_expert,
)
from tests.support.dispatch.layer import Layer
from tests.support.dispatch.layouts import Layout
from tests.support.dispatch.plans import counted, node_groups, sharding_of

pytestmark = pytest.mark.usefixtures("uncovered")

EXCHANGE = "all_to_all_single"


def layer_between(rank: int, case: Case, nodes: NodeGroups) -> Layer:
    return Layer(rank, case, functools.partial(plan_hierarchical, nodes=nodes), weigh_in_combine=True)


def other_than_flat(layer: Layer) -> list[str]:
    """What the experts see that differs in any bit from one step over all ranks."""
    case, plan = layer.case, layer.plan
    flat = counted(
        layer.expert_BlK,
        dim=case.x_BLD.shape[-1],
        sharding=sharding_of(case.layout),
        experts=Partition(case.experts),
    )
    x_MD, weight_M = dispatch(layer.x_BlD, layer.weight_BlK, flat)
    pairs = {
        "x_MD": (layer.x_MD, x_MD),
        "weight_M": (layer.weight_M, weight_M),
        "rows_per_expert_e": (plan.rows_per_expert_e, flat.rows_per_expert_e),
        "token_of_row_M": (plan.token_of_row_M, flat.token_of_row_M),
        "choice_of_row_M": (plan.within.choice_of_row_M, flat.choice_of_row_M),
    }
    found = [name for name, (a, b) in pairs.items() if not a.equal(b)]
    # Of whole numbers every sum is exact, in whatever order.
    whole_MD = (8 * x_MD).round()
    if not combine(whole_MD, plan).equal(combine(whole_MD, flat)):
        found.append("the sum of whole numbers")
    return found


def crossings(rank: int, case: Case, nodes: NodeGroups) -> list[int]:
    """How many distinct tokens of this rank need each node."""
    rank_of, in_node = rank_of_expert(case.experts), nodes.intra.size()
    ids_tK = case.layout.cut(case.expert_BLK)[rank].flatten(0, 1).tolist()
    pairs = {(t, rank_of[e] // in_node) for t, expert_K in enumerate(ids_tK) for e in expert_K if e >= 0}
    return [sum(to == node for _, to in pairs) for node in range(nodes.inter.size())]


# ---- cases: what the ranks run -------------------------------------------------------------------------


def run_cases(rank: int, shape: tuple[int, int], cases: list[tuple[Case, Answer]]) -> list[str]:
    failures = []
    with node_groups(rank, *shape) as nodes:
        for case, answer in cases:
            try:
                layer = layer_between(rank, case, nodes)
                found = other_than_flat(layer) + differences(layer.backward(), answer.for_rank(rank, case))
            except Exception as error:
                error.add_note(f"in case {case.name}")
                raise
            if list(layer.plan.between.rows_sent) != crossings(rank, case, nodes):
                found.append("not one row per token and node")
            failures += [f"{case.name}: {what}" for what in found]
    return failures


def run_recorded(rank: int, case: Case) -> tuple[list[list[int]], int, list[tuple[int, ...]]]:
    """Sizes of the groups of the collectives of plan, dispatch, combine and backward; rows of saved tensors."""
    calls: list[list[int]] = [[]]
    saved: list[tuple[int, ...]] = []
    exchange = dist.all_to_all_single

    def record(*args: Any, group: dist.ProcessGroup, **kwargs: Any) -> Any:
        calls[-1].append(dist.get_process_group_ranks(group)[-1] - dist.get_process_group_ranks(group)[0])
        return exchange(*args, group=group, **kwargs)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with node_groups(rank, 2, 2) as nodes, mock.patch.object(dist, EXCHANGE, record):
        x_BlD, expert_BlK = (case.layout.cut(t)[rank] for t in (case.x_BLD, case.expert_BLK))
        x_BlD.requires_grad_()
        weight_BlK = torch.ones(expert_BlK.shape, requires_grad=True)
        plan = plan_hierarchical(
            expert_BlK,
            dim=x_BlD.shape[-1],
            sharding=sharding_of(case.layout),
            experts=Partition(case.experts),
            nodes=nodes,
        )
        calls.append([])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
            calls.append([])
            y_BlD = combine(x_MD, plan)
        calls.append([])
        (y_BlD.sum() + 0 * weight_M.sum()).backward()
        counted = list(calls)
        calls.append([])
        again = plan_hierarchical(
            expert_BlK,
            dim=x_BlD.shape[-1],
            sharding=sharding_of(case.layout),
            experts=Partition(case.experts),
            nodes=nodes,
        )
        assert again == plan
    return counted, len(x_MD), saved


def run_low_precision(rank: int, case: Case) -> tuple[float, float]:
    """Largest differences of output and gradient of x, relative to the largest values, in bfloat16 and float64."""
    layout, found = case.layout, []
    weight_BLK = chosen_weights(case.logits_BLE, case.expert_BLK).float()
    with node_groups(rank, 2, 2) as nodes:
        for dtype in (torch.bfloat16, torch.float64):
            x_BlD = layout.cut(case.x_BLD.bfloat16().to(dtype))[rank].requires_grad_()
            weight_BlK = layout.cut(weight_BLK)[rank]
            plan = plan_hierarchical(
                layout.cut(case.expert_BLK)[rank],
                dim=x_BlD.shape[-1],
                sharding=sharding_of(layout),
                experts=Partition(case.experts),
                nodes=nodes,
                dtype=dtype,
            )
            x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
            assert (x_MD.dtype, weight_M.dtype) == (dtype, torch.float32)
            y_BlD = combine(x_MD, plan, weight_M)
            (grad_BlD,) = torch.autograd.grad(y_BlD, x_BlD, torch.ones_like(y_BlD))
            assert (y_BlD.dtype, grad_BlD.dtype) == (dtype, dtype)
            found.append((y_BlD.detach().double(), grad_BlD.double()))
    if not found[0][0].numel():
        return 0.0, 0.0
    y, grad = (((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found, strict=True))
    return y, grad


# ---- what the tests ask --------------------------------------------------------------------------------


def ask(rank_threads: RankThreads, shape: tuple[int, int], cases: list[Case]) -> None:
    answered = [(case, dense_answer(case)) for case in cases]
    failures = rank_threads.run(run_cases, shape[0] * shape[1], shape, answered)
    assert [failure for of_rank in failures for failure in of_rank] == []


@pytest.mark.parametrize("first", [0, 1, 2])
def test_two_nodes_of_two_equal_one_step_and_the_dense_layer(rank_threads: RankThreads, first: int) -> None:
    """B from 1 to 3, uneven and empty shards, both orders, -1, repeated ids, one expert, one rank, uneven experts, a
    node without experts."""
    torch.manual_seed(first)
    ask(rank_threads, (2, 2), make_cases(4)[first::9])


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (3, 1), (1, 2), (2, 1), (1, 1)])
def test_other_numbers_of_nodes(rank_threads: RankThreads, shape: tuple[int, int]) -> None:
    torch.manual_seed(7)
    ask(rank_threads, shape, make_cases(shape[0] * shape[1])[::23])


@pytest.mark.parametrize("experts", [(3, 1, 0, 0), (0, 0, 0, 5)])
def test_a_node_without_experts(rank_threads: RankThreads, experts: tuple[int, ...]) -> None:
    torch.manual_seed(8)
    layout = Layout(batch=(2,), seq=(3, 0, 1, 2))
    ask(rank_threads, (2, 2), [make_case(layout, "holes", experts=experts, num_choices=4, dim=3, width=2)])


def hand_case() -> Case:
    """5 tokens of 2 rows: node 0 has experts 0 to 2, node 1 has 3 to 5."""
    layout = Layout(batch=(2,), seq=(2, 0, 1, 2))
    case = make_case(layout, "none", experts=(2, 1, 1, 2), num_choices=3, dim=4, width=4)
    of_row_0 = [[0, 1, 2], [0, 3, 5], [3, 4, 5], [-1, -1, -1], [2, 2, 2]]
    of_row_1 = [[3, 3, 0], [5, -1, 5], [0, 5, 1], [4, 1, -1], [2, 4, 5]]
    return dataclasses.replace(case, expert_BLK=torch.tensor([of_row_0, of_row_1]))


def between_rows(rank: int, case: Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    with node_groups(rank, 2, 2) as nodes:
        plan = layer_between(rank, case, nodes).plan
    return plan.between.rows_sent, plan.within.rows_sent


def test_a_token_crosses_to_a_node_once_and_to_a_rank_of_it_once(rank_threads: RankThreads) -> None:
    # Rank 0 holds positions 0 and 1 of both rows, rank 2 position 2, rank 3 positions 3 and 4.
    # Node 0 is needed by tokens (0, 0), (0, 1), (1, 0) of rank 0, (1, 2) of rank 2, and three of rank 3's four.
    assert rank_threads.run(between_rows, 4, hand_case()) == [
        ((3, 3), (4, 1)),  # 3 + 1 tokens came to rank 0; they need rank 0 and, for expert 2, rank 1
        ((0, 0), (1, 2)),  # those of rank 3
        ((1, 2), (3, 4)),
        ((3, 2), (0, 2)),
    ]


def test_collectives_and_what_is_kept(rank_pool: RankPool) -> None:
    """Ranks of a node are 1 apart, those of a column 2."""
    results = rank_pool.run(run_recorded, 4, hand_case())
    for calls, _, saved in results:
        assert calls == [[2, 1], [2, 1], [1, 2], [2, 1, 1, 2]]
        assert saved == [(0,)]  # by which a checkpoint knows that backward is there
    assert sum(rows for _, rows, _ in results) == 25


def test_bfloat16_rows_with_float32_weights(rank_threads: RankThreads) -> None:
    torch.manual_seed(9)
    case = make_case(
        Layout(batch=(2,), seq=(9, 0, 4, 7)), "duplicates", experts=(2, 2, 1, 3), num_choices=4, dim=16, width=16
    )
    # Three roundings of half a unit in the last of 8 bits, measured 0.005.
    assert max(max(errors) for errors in rank_threads.run(run_low_precision, 4, case)) < 3 * 2**-8


def refused_rows(rank: int, case: Case) -> list[str]:
    texts = []
    with node_groups(rank, 2, 2) as nodes:
        layer = layer_between(rank, case, nodes)
        x_BlD, weight_BlK, y_MD = layer.x_BlD, layer.weight_BlK, layer.x_MD
        for call in (
            lambda: dispatch(x_BlD[..., 1:], weight_BlK, layer.plan),
            lambda: dispatch(x_BlD, weight_BlK[..., 1:], layer.plan),
            lambda: combine(torch.cat([y_MD, y_MD[:1], y_MD.new_zeros(1, 4)]), layer.plan),
        ):
            with pytest.raises(ValueError, match="the plan") as raised:
                call()
            texts.append(str(raised.value))
    return texts


def test_rows_that_do_not_fit_the_plan(rank_threads: RankThreads) -> None:
    for rank, (x, weight, y) in enumerate(rank_threads.run(refused_rows, 4, hand_case())):
        assert x.startswith(f"rank {rank}: x is (2,")
        assert weight.startswith(f"rank {rank}: weights are (2,")
        assert "one floating-point row per row of dispatch" in y


def kept_by_layers(rank: int) -> list[int]:
    """Grids made by the plans of three layers, one after the other."""
    made: list[GroupTokens] = []
    make = GroupTokens.made

    def counted(*args: Any, **given: Any) -> GroupTokens:
        made.append(make(*args, **given))
        return made[-1]

    numbers = []
    sharding, experts = TokenSharding(batch=2, seq=Partition((3, 0, 1, 2))), Partition((2, 1, 0, 1))
    expert_BlK = torch.zeros(*sharding.local_shape(rank), 1, dtype=torch.int64)
    with node_groups(rank, 2, 2) as nodes, mock.patch.object(GroupTokens, "made", counted):
        for _ in range(3):
            plan_hierarchical(expert_BlK, dim=4, sharding=sharding, experts=experts, nodes=nodes)
            numbers.append(len(made))
    return numbers


def test_layers_of_a_step_share_what_their_plans_know_beforehand(rank_pool: RankPool) -> None:
    assert rank_pool.run(kept_by_layers, 4) == [[2, 2, 2]] * 4
