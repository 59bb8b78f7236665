"""A plan by counts is the plan by ids: the same fields once rows have come, the same bits of rows and gradients."""

from copy import deepcopy
from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from moe_dispatch import DispatchMetadata, Partition, combine, dispatch, plan_hierarchical, start_dispatch
from moe_dispatch.testing import RankThreads
from tests.support.dispatch.dense import Case, make_case
from tests.support.dispatch.layouts import EXPERTS, Layout, layouts
from tests.support.dispatch.plans import FORMS, Kind, node_groups, sharding_of
from tests.support.dispatch.routings import ROUTINGS

pytestmark = pytest.mark.usefixtures("uncovered")

KNOWN_LATER = ("token_of_row_M", "received_of_row_M", "choice_of_row_M", "row_of_entry_M", "first_entry_R")
DTYPES = [
    (torch.float64, torch.float64),  # x and weights: numbers and ids are narrower
    (torch.float32, torch.float64),
    (torch.bfloat16, torch.float32),  # wider
    (torch.float16, torch.float16),
]


def plan_of(kind: Kind, rank: int, case: Case) -> DispatchMetadata:
    return FORMS[kind](
        case.layout.cut(case.expert_BLK)[rank],
        dim=case.x_BLD.shape[-1],
        sharding=sharding_of(case.layout),
        experts=Partition(case.experts),
    )


def inputs_of(rank: int, case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rank)
    x_BlD = case.layout.cut(case.x_BLD)[rank].to(dtypes[0]).clone().requires_grad_()
    shape = case.layout.cut(case.expert_BLK)[rank].shape
    return x_BlD, torch.rand(shape, generator=draw, dtype=torch.float64).to(dtypes[1]).requires_grad_()


def results_of(plan: DispatchMetadata, x_BlD: Tensor, weight_BlK: Tensor) -> dict[str, Tensor]:
    x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
    y_BlD = combine(x_MD * 1.5, plan, weight_M)
    grad_x, grad_weight = torch.autograd.grad(y_BlD.square().sum(), (x_BlD, weight_BlK))
    return {"x_MD": x_MD, "weight_M": weight_M, "y_BlD": y_BlD, "grad_x": grad_x, "grad_weight": grad_weight}


def values_of(plan: DispatchMetadata) -> dict[str, object]:
    names = [f.name for f in fields(plan) if f.name != "row_index"]
    return {name: getattr(plan, name) for name in (*names, *KNOWN_LATER, "num_rows", "num_received")}


def different(a: dict[str, object], b: dict[str, object]) -> list[str]:
    assert a.keys() == b.keys()

    def same(x: object, y: object) -> bool:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)
        return x == y

    return [name for name in a if not same(a[name], b[name])]


def compare(rank: int, cases: list[Case]) -> list[str]:
    found = []
    for i, case in enumerate(cases):
        by_ids, by_counts = (plan_of(kind, rank, case) for kind in FORMS)
        before = {f.name for f in fields(by_counts)} - {"row_index"}
        known_before = {name: getattr(by_counts, name) for name in before}
        wrong = different(known_before, {name: getattr(by_ids, name) for name in before})
        inputs = inputs_of(rank, case, DTYPES[i % len(DTYPES)])
        results = [dict[str, object](results_of(plan, *inputs)) for plan in (by_ids, by_counts)]
        wrong += different(*results) + different(values_of(by_ids), values_of(by_counts))
        if by_ids != by_counts or by_counts != by_ids:
            wrong.append("==")
        found += [f"{case.name}: {name}" for name in wrong]
    return found


def cases_of(ranks: int) -> list[Case]:
    """Every layout (uneven, empty, both orders, both cut) with routings in turn; K 1, 3 and 9."""
    torch.manual_seed(ranks)
    found = []
    for i, (layout, routing) in enumerate(product(layouts(ranks), ROUTINGS)):
        if i % 3 == 0:
            experts = (EXPERTS[ranks] + [(200, 90, 10, 0)[:ranks]])[i // 3 % (len(EXPERTS[ranks]) + 1)]
            num_choices = min((3, 1, 9)[i // 6 % 3], sum(experts) if routing == "top_k" else 9)
            found.append(make_case(layout, routing, experts=experts, num_choices=num_choices, dim=5, width=5))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_fields_and_the_bits_of_a_plan_by_ids(rank_threads: RankThreads, ranks: int) -> None:
    assert rank_threads.run(compare, ranks, cases_of(ranks)) == [[]] * ranks


def small_case() -> Case:
    torch.manual_seed(3)
    layout = Layout(batch=(2,), seq=(3, 0, 2))
    return make_case(layout, "holes", experts=(2, 0, 3), num_choices=3, dim=4, width=4)


def read_too_early(rank: int, case: Case) -> list[str]:
    plan = plan_of("by counts", rank, case)
    x_BlD, weight_BlK = inputs_of(rank, case, DTYPES[0])
    pending = start_dispatch(x_BlD, weight_BlK, plan)
    texts = []
    for name in KNOWN_LATER:
        with pytest.raises(RuntimeError) as error:
            getattr(plan, name)
        texts.append(str(error.value))
    with pytest.raises(RuntimeError, match="the rows of this plan over 3 ranks have not come yet"):
        combine(torch.ones(plan.num_rows, 4), plan)
    assert plan.num_rows == int(plan.rows_per_expert_e.sum())
    x_MD, _ = pending.finish()
    assert len(x_MD) == len(plan.token_of_row_M) == plan.num_rows
    return texts


def test_what_comes_with_the_rows_cannot_be_read_before(rank_threads: RankThreads) -> None:
    for rank, texts in enumerate(rank_threads.run(read_too_early, 3, small_case())):
        assert set(texts) == {
            f"rank {rank}: the rows of this plan over 3 ranks have not come yet, and the ids that tell which token "
            "and choice each is come with them; dispatch by the plan first (dispatch(...), or finish() of "
            "start_dispatch(...)). rows_per_expert_e is known before"
        }


def uses(rank: int, case: Case) -> list[str]:
    """What is not as it should be of a plan that is used again, copied, compared, or used without gradients."""
    inputs = inputs_of(rank, case, DTYPES[0])
    wanted = results_of(plan_of("by ids", rank, case), *inputs)
    plan, found = plan_of("by counts", rank, case), []
    copied = deepcopy(plan)
    if copied != plan or copied.group is not plan.group or copied.row_index.found is not None:
        found.append("a copy before")
    with torch.inference_mode():
        first = dispatch(inputs[0].detach(), inputs[1].detach(), plan)
    index = plan.index
    if not all(map(torch.equal, first, (wanted["x_MD"], wanted["weight_M"]))) or index.token_of_row_M.is_inference():
        found.append("in inference mode")
    with torch.autocast("cpu", torch.bfloat16):
        again = results_of(plan, *inputs)
    for name, results in (("again", again), ("copy", results_of(copied, *inputs)), ("copied after", results_of(
        deepcopy(plan), *inputs))):  # fmt: skip
        found += [f"{name}: {wrong}" for wrong in different(dict(wanted), dict(results))]
    if plan.index is not index or plan != copied or plan.index is copied.index:
        found.append("the tensors of a plan are made once")
    other = plan_of("by counts", rank, replace(case, expert_BLK=(case.expert_BLK + 1) % sum(case.experts)))
    results_of(other, *inputs)
    if other == plan and case.layout.cut(case.expert_BLK)[rank].numel():
        found.append("equal to a plan of other ids")
    return found


def test_a_plan_is_used_again_copied_and_compared(rank_threads: RankThreads) -> None:
    assert rank_threads.run(uses, 3, small_case()) == [[]] * 3


def plans_of_other_peers(rank: int) -> tuple[bool, bool]:
    """Equal before rows have come, and after: this rank's ids are the same, its peer's are in another order."""
    layout, sharding = Layout(batch=(1,), seq=(2, 2)), Partition((2, 2))
    plans = []
    for last in ([[2], [3]], [[3], [2]]):
        ids = torch.tensor([[[0], [1], *last]])
        given = {"dim": 1, "sharding": sharding_of(layout), "experts": sharding}
        plans.append(FORMS["by counts"](layout.cut(ids)[rank], **given))
    before = plans[0] == plans[1]
    for plan in plans:
        dispatch(torch.ones(1, 2, 1), torch.ones(1, 2, 1), plan)
    return before, plans[0] == plans[1]


def test_equality_is_that_of_what_is_known(rank_threads: RankThreads) -> None:
    assert rank_threads.run(plans_of_other_peers, 2) == [(True, True), (False, False)]


def hierarchical_is_by_ids(rank: int, case: Case) -> bool:
    with node_groups(rank, 16, 1) as nodes:
        plan = plan_hierarchical(
            case.layout.cut(case.expert_BLK)[rank],
            dim=4,
            sharding=sharding_of(case.layout),
            experts=Partition(case.experts),
            nodes=nodes,
        )
        return plan.between.row_index.found is not None and len(plan.token_of_row_M) == plan.num_rows


def test_both_steps_of_a_hierarchical_plan_know_their_rows_at_once(rank_threads: RankThreads) -> None:
    torch.manual_seed(5)
    case = make_case(Layout(batch=(1,), seq=(1,) * 16), "uniform", experts=(1,) * 16, num_choices=2, dim=4, width=4)
    assert rank_threads.run(hierarchical_is_by_ids, 16, case) == [True] * 16
