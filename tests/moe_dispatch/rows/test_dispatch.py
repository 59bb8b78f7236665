"""dispatch, experts and combine equal the dense layer: outputs and every gradient on every rank, to 1e-12.

The whole of a case is the same on every rank; ranks cut their share out of it by slicing (tests/dense.py), run the
layer, and say what differs from their share of the dense answer.
"""

import dataclasses
from collections.abc import Callable, Hashable
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import (
    DispatchMetadata,
    Partition,
    StaticSizes,
    TokenSharding,
    combine,
    dispatch,
    plan_dispatch,
    plan_static,
)
from moe_dispatch.testing import RankPool
from tests.support.dense import (
    EXPERTS,
    ROUTINGS,
    Answer,
    Case,
    Layout,
    Order,
    chosen_weights,
    crossings,
    dense_answer,
    differences,
    layouts,
    make_case,
    make_cases,
    rank_of_expert,
    rows_in_order,
    through_experts,
)

Memory = Callable[[Tensor], Tensor]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MEMORIES: dict[str, Memory] = {
    "contiguous": lambda x_BlD: x_BlD,
    "transposed": lambda x_BlD: x_BlD.transpose(0, 2).contiguous().transpose(0, 2),
    "sliced": lambda x_BlD: torch.stack([x_BlD, x_BlD + 1], dim=-1)[..., 0],
    "rows apart": lambda x_BlD: torch.stack([x_BlD, x_BlD + 1], dim=1)[:, 0],
}


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def sharding_of(layout: Layout) -> TokenSharding:
    return TokenSharding(batch=Partition(layout.batch), seq=Partition(layout.seq), order=layout.order)


# ---- the layer under test ------------------------------------------------------------------------------


class Layer:
    """One rank's forward of a case, and its backward when asked."""

    def __init__(
        self,
        rank: int,
        case: Case,
        *,
        memory: Memory = MEMORIES["contiguous"],
        weigh_in_combine: bool = False,
        group: dist.ProcessGroup | None = None,
        sharding: TokenSharding | None = None,
    ) -> None:
        group, piece = group or world(), case.layout.cut
        sharding = sharding or sharding_of(case.layout)
        self.case, self.memory = case, memory
        self.x_BlD, self.logits_BlE = (piece(t)[rank].clone().requires_grad_() for t in (case.x_BLD, case.logits_BLE))
        self.w_eDF = case.w_EDF.split(case.experts)[group.rank()].clone().requires_grad_()
        expert_BlK = piece(case.expert_BLK)[rank]
        self.weight_BlK = chosen_weights(self.logits_BlE, expert_BlK)
        self.grad_BlF = memory(piece(case.grad_BLF)[rank])
        self.metadata = plan_dispatch(
            memory(expert_BlK),
            dim=case.x_BLD.shape[-1],
            sharding=sharding,
            experts=Partition(case.experts),
            group=group,
            weight_BlK=self.weight_BlK,
        )
        self.x_MD, self.weight_M = dispatch(memory(self.x_BlD), memory(self.weight_BlK), self.metadata)
        y_MF = self.experts(self.x_MD)
        if weigh_in_combine:
            self.y_BlF = combine(y_MF, self.metadata, self.weight_M)
        else:
            self.y_BlF = combine(self.weight_M.unsqueeze(1) * y_MF, self.metadata)

    def experts(self, x_MD: Tensor) -> Tensor:
        return through_experts(x_MD, self.w_eDF, self.metadata.rows_per_expert_e.tolist())

    def backward(self) -> Answer:
        inputs = (self.x_BlD, self.weight_BlK, self.logits_BlE, self.w_eDF)
        x, weight, logits, w = torch.autograd.grad(self.y_BlF, inputs, self.grad_BlF, materialize_grads=True)
        return Answer(y=self.y_BlF.detach(), x=x, weight=weight, logits=logits, w=w)


def rows_of_rank(case: Case, rank: int) -> list[tuple[int, int, int]]:
    rank_of = rank_of_expert(case.experts)
    return [row for row in rows_in_order(case.expert_BLK.flatten(0, 1)) if rank_of[row[0]] == rank]


def misplaced(layer: Layer, rank: int) -> list[str]:
    """Which facts about the rows this rank's experts see are not those of the plain lists. All bit for bit."""
    case, plan, rows = layer.case, layer.metadata, rows_of_rank(layer.case, rank)
    mine = range(sum(case.experts[:rank]), sum(case.experts[: rank + 1]))
    counts = [sum(expert == e for expert, _, _ in rows) for e in mine]
    token_M = torch.tensor([token for _, token, _ in rows], dtype=torch.int64)
    choice_M = torch.tensor([choice for _, _, choice in rows], dtype=torch.int64)
    weight_TK = chosen_weights(case.logits_BLE, case.expert_BLK).flatten(0, 1)
    crossed = crossings(case.layout, case.experts, case.expert_BLK)
    checks = {
        "x_MD": layer.x_MD.equal(case.x_BLD.flatten(0, 1)[token_M]),
        "weight_M": layer.weight_M.equal(weight_TK[token_M, choice_M]),
        "rows_per_expert_e": plan.rows_per_expert_e.tolist() == counts,
        "token_of_row_M": plan.token_of_row_M.equal(token_M),
        "choice_of_row_M": plan.choice_of_row_M.equal(choice_M),
        "rows_sent": plan.rows_sent == tuple(crossed[rank]),
        "rows_received": plan.rows_received == tuple(source[rank] for source in crossed),
        "local_shape": plan.local_shape == tuple(layer.x_BlD.shape),
    }
    return [f"{name} is misplaced" for name, right in checks.items() if not right]


def failures_of(case: Case, found: list[str]) -> list[str]:
    return [f"{case.name}: {what}" for what in found]


# ---- cases: what the ranks run -------------------------------------------------------------------------


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
    layer = Layer(rank, case, group=group, sharding=sharding_of(case.layout).select(groups[number]))
    found = differences(layer.backward(), answer.for_rank(rank, case, group.rank()))
    if layer.metadata.token_of_row_M.tolist() != [token for _, token, _ in rows_of_rank(case, group.rank())]:
        found.append("token_of_row_M")
    dist.destroy_process_group(group)
    return found


def run_with_poison(rank: int, case: Case, answer: Answer) -> list[str]:
    """As the dense layer without poison; the poisoned tokens, which no expert sees, give exact zeros."""
    got = Layer(rank, case).backward()
    unseen_Bl = case.layout.cut((case.expert_BLK < 0).all(-1))[rank]
    zeros = [name for name, t in (("y", got.y), ("x", got.x)) if t[unseen_Bl].count_nonzero()]
    return differences(got, answer.for_rank(rank, case)) + zeros


def expert_inputs(rank: int, case: Case) -> tuple[Tensor, ...]:
    layer = Layer(rank, case)
    plan = layer.metadata
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
    plan, expert_BlK = layer.metadata, case.layout.cut(case.expert_BLK)[rank]
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


# ---- cases of rounding -----------------------------------------------------------------------------------


def half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance of neighbours in ``dtype`` around float64 values."""
    info = torch.finfo(dtype)
    return 0.5 * info.eps * 2.0 ** (value.abs().clamp(min=info.tiny).frexp().exponent - 1)


def sums_by_rank(y_TKD: Tensor, expert_TK: Tensor, experts: tuple[int, ...]) -> Tensor:
    """(ranks, T, D) in float64: for each token, the sum of its rows on each rank."""
    rank_of = torch.tensor([*rank_of_expert(experts), -1])  # id -1 reads the last place
    rank_TK = rank_of[expert_TK]
    return torch.stack([(y_TKD.double() * (rank_TK == rank).unsqueeze(-1)).sum(1) for rank in range(len(experts))])


def excess(got_TD: Tensor, y_TKD: Tensor, expert_TK: Tensor, experts: tuple[int, ...]) -> float:
    """Error of the sums over what one rounding for the wire and one for the result can make. 1 is the limit."""
    sums_PTD = sums_by_rank(y_TKD, expert_TK, experts)
    wire_TD = half_ulp(sums_PTD, got_TD.dtype).where(sums_PTD != 0, 0).sum(0)
    float32_TD = y_TKD.double().abs().sum(1) * 2.0**-22
    sum_TD = sums_PTD.sum(0)
    bound_TD = wire_TD + half_ulp(sum_TD.abs() + wire_TD, got_TD.dtype) + float32_TD
    return ((got_TD.double() - sum_TD).abs() / bound_TD).max().item()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounded:
    """One rank's sums in low precision, the same sums three ways, and what must be copies."""

    combined: Tensor
    weighted: Tensor
    grad_x: Tensor
    copies_are_exact: bool


def run_rounding(rank: int, case: Case, y_TKD: Tensor, weight_TK: Tensor, memory: str) -> Rounded:
    """Rows that are given, not computed: combine, combine with weights, and the backward of dispatch sum them."""
    sharding, dtype = sharding_of(case.layout), y_TKD.dtype
    expert_BlK = case.layout.cut(case.expert_BLK)[rank]
    plan = plan_dispatch(
        expert_BlK, dim=y_TKD.shape[2], sharding=sharding, experts=Partition(case.experts), group=world()
    )
    row_of_M = (plan.token_of_row_M, plan.choice_of_row_M)
    y_MD, weight_M = y_TKD[row_of_M], weight_TK[row_of_M].requires_grad_()
    y_MD = (y_MD.T.contiguous().T if memory == "transposed" else y_MD).requires_grad_()
    x_BlD = torch.zeros(plan.local_shape, dtype=dtype, requires_grad=True)
    weight_BlK = torch.zeros(expert_BlK.shape, requires_grad=True)
    sent = dispatch(x_BlD, weight_BlK, plan)
    grad_x, grad_weight = torch.autograd.grad(sent, (x_BlD, weight_BlK), (y_MD, weight_M))
    weighted = combine(y_MD, plan, weight_M)
    token_tK = case.layout.cut(case.layout.ids()[0])[rank].flatten()
    grad_y_tD = y_TKD[:, 0][token_tK]
    (grad_y_MD,) = torch.autograd.grad(weighted, y_MD, grad_y_tD.view(weighted.shape))
    wanted_grad_MD = (y_TKD[:, 0][plan.token_of_row_M].float() * weight_M.unsqueeze(1)).to(dtype)
    wanted_weight_tK = weight_TK[token_tK].where(expert_BlK.flatten(0, 1) >= 0, 0)
    exact = grad_y_MD.equal(wanted_grad_MD) and grad_weight.flatten(0, 1).equal(wanted_weight_tK)
    combined = combine(y_MD, plan)
    return Rounded(combined=combined.detach(), weighted=weighted.detach(), grad_x=grad_x, copies_are_exact=exact)


def run_mixed_dtypes(rank: int) -> list[str]:
    """Identity experts, integer rows and weights that are powers of 2: every sum is exact, in every dtype."""
    ranks, failures = dist.get_world_size(), []
    experts = Partition((2,) * ranks)
    for x_dtype, weight_dtype, dim, num_choices, tokens in product(DTYPES, DTYPES, (1, 7, 8), (1, 3), (0, 1, 2)):
        sharding = TokenSharding(batch=tokens, seq=Partition((*[0] * (ranks - 1), 1)))
        x_BLD = torch.randint(-4, 5, (tokens, 1, dim)).to(x_dtype)
        weight_BLK = (2.0 ** torch.randint(-1, 3, (tokens, 1, num_choices))).to(weight_dtype)
        expert_BLK = torch.randint(-1, experts.total, (tokens, 1, num_choices))
        x, weight = (sharding.shard(t, rank).clone().requires_grad_() for t in (x_BLD, weight_BLK))
        name = f"x {x_dtype} weights {weight_dtype} D {dim} K {num_choices} T {tokens}"
        try:
            plan = plan_dispatch(
                sharding.shard(expert_BLK, rank), dim=dim, sharding=sharding, experts=experts, group=world()
            )
            x_MD, weight_M = dispatch(x, weight, plan)
            y = combine(x_MD, plan, weight_M)
            y.backward(torch.ones_like(y))
        except Exception as error:
            error.add_note(f"in case {name}")
            raise
        sum_BL1 = (weight_BLK.double() * (expert_BLK >= 0)).sum(-1, keepdim=True)
        row_BL1 = x_BLD.double().sum(-1, keepdim=True)
        wanted = {
            "y": (y, (sum_BL1 * x_BLD.double()).to(x_dtype)),
            "d x": (x.grad, sum_BL1.expand_as(x_BLD).to(x_dtype)),
            "d weight": (weight.grad, (row_BL1 * (expert_BLK >= 0)).to(weight_dtype)),
            "dtype of rows": (x_MD[:0], x_BLD[:0, 0]),
            "dtype of weights": (weight_M[:0], weight_BLK[:0, 0, 0]),
        }
        for what, (got, whole) in wanted.items():
            want = sharding.shard(whole, rank) if whole.ndim == 3 else whole
            if got is None or got.dtype != want.dtype or not got.equal(want):
                failures.append(f"{name}: {what}")
    return failures


# ---- outputs and gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_outputs_and_gradients_equal_the_dense_layer(rank_pool: RankPool, ranks: int) -> None:
    torch.manual_seed(ranks)
    cases = [(case, dense_answer(case)) for case in make_cases(ranks)]
    assert len(cases) >= 180
    met = {(turns(i), case.expert_BLK.shape[2], case.experts) for i, (case, _) in enumerate(cases)}
    assert len({(weigh, num_choices) for (_, weigh), num_choices, _ in met}) == 2 * 3
    assert len({(memory, experts) for (memory, _), _, experts in met}) == 4 * len(EXPERTS[ranks])
    for failures in rank_pool.run(run_cases, ranks, cases):
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
def test_the_order_of_the_choices_does_not_matter(rank_pool: RankPool, ranks: int) -> None:
    torch.manual_seed(50)
    case = make_case(layouts(ranks)[0], "holes", experts=EXPERTS[ranks][0], num_choices=3, dim=8, width=8)
    for failures in rank_pool.run(run_permuted_choices, ranks, case, dense_answer(case)):
        assert failures == []


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_expanded_inputs_and_gradients(rank_pool: RankPool, ranks: int) -> None:
    torch.manual_seed(60)
    case = make_case(layouts(ranks)[0], "one_expert", experts=EXPERTS[ranks][0], num_choices=2, dim=7, width=5)
    x_BLD, logits_BLE, grad_BLF = (one_number(t).clone() for t in (case.x_BLD, case.logits_BLE, case.grad_BLF))
    case = dataclasses.replace(case, x_BLD=x_BLD, logits_BLE=logits_BLE, grad_BLF=grad_BLF)
    for failures in rank_pool.run(run_expanded, ranks, case, dense_answer(case)):
        assert failures == []


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_weight_of_zero_keeps_its_gradient(rank_pool: RankPool, ranks: int) -> None:
    torch.manual_seed(65)
    case = make_case(layouts(ranks)[0], "duplicates", experts=EXPERTS[ranks][0], num_choices=2, dim=7, width=7)
    case.logits_BLE[..., ::2] = -1000.0
    answer = dense_answer(case)
    zero_BLK = chosen_weights(case.logits_BLE, case.expert_BLK) == 0
    assert answer.weight[zero_BLK].count_nonzero() == zero_BLK.sum() > 0
    for failures in rank_pool.run(run_cases, ranks, [(case, answer)]):
        assert failures == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_tokens_without_experts_cannot_poison_others(rank_pool: RankPool, ranks: int) -> None:
    torch.manual_seed(70)
    case = make_case(layouts(ranks)[0], "uniform", experts=EXPERTS[ranks][0], num_choices=2, dim=7, width=7)
    case.expert_BLK[torch.rand(case.layout.grid) < 0.5] = -1
    unseen_BL = (case.expert_BLK < 0).all(-1)
    assert 0 < unseen_BL.sum() < unseen_BL.numel()
    answer = dense_answer(case)
    case.x_BLD[unseen_BL] = torch.nan
    for failures in rank_pool.run(run_with_poison, ranks, case, answer):
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


# ---- the same bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_second_run_gives_the_same_bits(rank_pool: RankPool, ranks: int) -> None:
    torch.manual_seed(90)
    cases = [
        make_case(layouts(ranks)[0], routing, experts=EXPERTS[ranks][0], num_choices=4, dim=7, width=7)
        for routing in ROUTINGS
    ]
    assert rank_pool.run(run_twice, ranks, cases) == [[]] * ranks


@pytest.mark.parametrize("order", ["BL", "LB"])
def test_experts_see_the_same_rows_for_any_sharding(rank_pool: RankPool, order: Order) -> None:
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
        by_rank = rank_pool.run(expert_inputs, cut.layout.ranks, cut)
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
def test_a_token_has_the_same_bits_on_any_rank(rank_pool: RankPool, order: Order, dtype: torch.dtype) -> None:
    """Sums run over ranks in their order, not over this rank last, though its rows do not travel."""
    torch.manual_seed(101)
    cuts = [((3,), (7, 0, 0)), ((3,), (0, 0, 7)), ((3,), (2, 4, 1)), ((1, 2, 0), (7,))]
    first = make_case(
        Layout(batch=(3,), seq=(7, 0, 0), order=order), "uniform", experts=(2, 3, 1), num_choices=6, dim=8, width=8
    )
    found = []
    for batch, seq in cuts:
        case = dataclasses.replace(first, layout=Layout(batch=batch, seq=seq, order=order))
        token_T, *rows = map(torch.cat, zip(*rank_pool.run(combined, 3, case, dtype), strict=True))
        found.append([of_rank_TD[token_T.argsort()] for of_rank_TD in rows])
    for got in found[1:]:
        assert all(map(torch.equal, got, found[0]))


@pytest.mark.parametrize("ranks", [1, 3])
def test_inputs_and_the_plan_are_left_as_they_were(rank_pool: RankPool, ranks: int) -> None:
    torch.manual_seed(110)
    case = make_case(layouts(ranks)[0], "holes", experts=EXPERTS[ranks][0], num_choices=2, dim=7, width=7)
    assert rank_pool.run(changed_inputs, ranks, case) == [[]] * ranks


# ---- rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sums_are_rounded_once_for_the_wire_and_once_for_the_result(
    rank_pool: RankPool, ranks: int, dtype: torch.dtype, memory: str
) -> None:
    """No more than half an ulp for each: ties may go either way, and do (embedding_bag and the cast differ)."""
    torch.manual_seed(120 + ranks)
    layout = dataclasses.replace(layouts(ranks)[0], batch=(40,))
    case = make_case(layout, "holes", experts=EXPERTS[ranks][0], num_choices=4, dim=1, width=1)
    num_tokens = case.expert_BLK[..., 0].numel()
    y_TKD, weight_TK = torch.randn(num_tokens, 4, 64).to(dtype), torch.rand(num_tokens, 4)
    expert_TK = case.expert_BLK.flatten(0, 1)
    product_TKD = y_TKD.float() * weight_TK.unsqueeze(-1)
    for rank, got in enumerate(rank_pool.run(run_rounding, ranks, case, y_TKD, weight_TK, memory)):
        token_t = layout.cut(layout.ids()[0])[rank].flatten()
        if not len(token_t):
            continue
        for what, rows_TKD in (("combined", y_TKD), ("weighted", product_TKD), ("grad_x", y_TKD)):
            sums_tD = getattr(got, what).flatten(0, 1)
            assert sums_tD.dtype == dtype
            # Measured: 0.50 to 1.00 of the bound; a sum kept in bfloat16 or float16 gives 1.5 and more.
            assert excess(sums_tD, rows_TKD[token_t], expert_TK[token_t], case.experts) <= 1, (rank, what)
        assert got.copies_are_exact, rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ranks", [1, 3])
def test_sums_of_integers_are_exact(rank_pool: RankPool, ranks: int, dtype: torch.dtype) -> None:
    torch.manual_seed(130 + ranks)
    layout = layouts(ranks)[0]
    case = make_case(layout, "duplicates", experts=EXPERTS[ranks][0], num_choices=4, dim=1, width=1)
    num_tokens = case.expert_BLK[..., 0].numel()
    y_TKD, weight_TK = (
        torch.randint(-8, 9, (num_tokens, 4, 5)).to(dtype),
        2.0 ** torch.randint(-1, 3, (num_tokens, 4)),
    )
    sums_TD = y_TKD.double().sum(1)
    weighted_TD = (y_TKD.double() * weight_TK.double().unsqueeze(-1)).sum(1)
    for rank, got in enumerate(rank_pool.run(run_rounding, ranks, case, y_TKD, weight_TK, "contiguous")):
        for whole_TD, got_BlD in ((sums_TD, got.combined), (sums_TD, got.grad_x), (weighted_TD, got.weighted)):
            assert layout.cut(whole_TD.to(dtype).unflatten(0, layout.grid))[rank].equal(got_BlD), rank
        assert got.copies_are_exact, rank


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_and_weights_of_any_dtypes(rank_pool: RankPool, ranks: int) -> None:
    """No token, one and two, on the last rank: one row has no stride, and bytes of rows end where weights begin."""
    assert rank_pool.run(run_mixed_dtypes, ranks) == [[]] * ranks


# ---- the plan -----------------------------------------------------------------------------------------------


def plan_by_hand(rank: int) -> dict[str, Any]:
    shape = (2, 2, 2) if rank == 0 else (2, 1, 2)
    ids = [2, 0, 1, 1, 2, -1, 2, 1] if rank == 0 else [0, 1, -1, -1]
    plan = plan_dispatch(
        torch.tensor(ids).view(shape),
        dim=4,
        sharding=TokenSharding(batch=2, seq=Partition((2, 1))),
        experts=Partition((2, 1)),
        group=world(),
    )
    values = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name != "group"}
    assert plan.group is world()
    dtypes = {value.dtype for value in values.values() if isinstance(value, Tensor)}
    assert dtypes == {torch.int64}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}


def test_a_plan_drawn_by_hand(rank_pool: RankPool) -> None:
    # Global tokens of B = 2 rows, L = 3      choices of each token             experts 0, 1 | 2
    #   rank 0 | rank 1                         (2, 0) (1, 1) | (0, 1)            rank 0     | rank 1
    #    0  1  |   2                            (2, -) (2, 1) | (-, -)
    #    3  4  |   5
    #
    # rank 0 sends 0 3 4 to rank 1, and 0 1 4 to itself; rank 1 sends 2 to rank 0.
    # rank 0 receives 2 0 1 4 and makes of them the rows   expert 0: 0 2, expert 1: 1 1 2 4.
    # rank 1 receives 0 3 4 and makes of them the rows     expert 2: 0 3 4.
    shared = {"sharding": TokenSharding(batch=2, seq=Partition((2, 1))), "experts": Partition((2, 1))}
    rank_0 = {
        "rank": 0,
        "local_shape": (2, 2, 4),
        "rows_sent": (3, 3),
        "rows_received": (3, 1),
        "expert_BlK": [[[2, 0], [1, 1]], [[2, -1], [2, 1]]],
        "rows_per_expert_e": [2, 4],
        "token_of_row_M": [0, 2, 1, 1, 2, 4],
        "received_of_row_M": [1, 0, 2, 2, 0, 3],
        "choice_of_row_M": [1, 0, 0, 1, 1, 1],
        "token_of_sent_S": [0, 2, 3, 0, 1, 3],
        "sent_of_entry_S": [3, 0, 4, 1, 5, 2],  # tokens 0: to ranks 0 and 1, 1: to 0, 3: to 1, 4: to 0 and 1
        "first_entry_t": [0, 2, 3, 4],
        "row_of_entry_M": [1, 4, 0, 2, 3, 5],  # received 2: two rows, 0: one, 1: two, 4: one
        "first_entry_R": [0, 2, 3, 5],
    }
    rank_1 = {
        "rank": 1,
        "local_shape": (2, 1, 4),
        "rows_sent": (1, 0),
        "rows_received": (3, 0),
        "expert_BlK": [[[0, 1]], [[-1, -1]]],
        "rows_per_expert_e": [3],
        "token_of_row_M": [0, 3, 4],
        "received_of_row_M": [0, 1, 2],
        "choice_of_row_M": [0, 0, 0],
        "token_of_sent_S": [0],
        "sent_of_entry_S": [0],
        "first_entry_t": [0, 1],  # token 5 has no entry: the next starts where it does
        "row_of_entry_M": [0, 1, 2],
        "first_entry_R": [0, 1, 2],
    }
    assert rank_pool.run(plan_by_hand, 2) == [rank_0 | shared, rank_1 | shared]


def ids_after_reuse(rank: int) -> bool:
    """Whether a plan keeps its ids when their tensor is filled for the next layer."""
    sharding = TokenSharding(batch=1, seq=Partition((2,) * dist.get_world_size()))
    ids_BlK = torch.zeros(1, 2, 2, dtype=torch.int64)
    plan = plan_dispatch(
        ids_BlK, dim=1, sharding=sharding, experts=Partition((2,) * dist.get_world_size()), group=world()
    )
    ids_BlK.fill_(1)
    return plan.expert_BlK.equal(torch.zeros_like(ids_BlK))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plan_keeps_its_ids_when_their_tensor_is_reused(rank_pool: RankPool, ranks: int) -> None:
    assert rank_pool.run(ids_after_reuse, ranks) == [True] * ranks


def replay(rank: int, case: Case) -> dict[str, bool]:
    """A plan from saved ids against the first; plans of other ids; and whether a plan can be written to."""

    def plan(ids_BLK: Tensor, dim: int = 7) -> DispatchMetadata:
        expert_BlK = case.layout.cut(ids_BLK)[rank]
        sharding, experts = sharding_of(case.layout), Partition(case.experts)
        return plan_dispatch(expert_BlK, dim=dim, sharding=sharding, experts=experts, group=world())

    first = plan(case.expert_BLK)
    other_BLK = (case.expert_BLK + 1) % sum(case.experts)
    saved = plan_dispatch(first.expert_BlK, dim=7, sharding=first.sharding, experts=first.experts, group=first.group)
    frozen = {}
    for field in dataclasses.fields(first):
        try:
            setattr(first, field.name, None)
        except dataclasses.FrozenInstanceError:
            frozen[field.name] = True
    return {
        "saved == first": saved == first and first == saved,
        "saved is first": saved is first,
        "other ids == first": plan(other_BLK) == first,
        "other dim == first": plan(case.expert_BLK, dim=8) == first,
        "equal to something else": first == "a plan",
        "all frozen": len(frozen) == len(dataclasses.fields(first)),
        "hashable": isinstance(first, Hashable),
        "needs a gradient": any(t.requires_grad for t in vars_of(first)),
    }


def vars_of(plan: DispatchMetadata) -> list[Tensor]:
    values = (getattr(plan, f.name) for f in dataclasses.fields(plan))
    return [value for value in values if isinstance(value, Tensor)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_plan_from_saved_ids_equals_the_first(rank_pool: RankPool, ranks: int) -> None:
    torch.manual_seed(140)
    layout = Layout(batch=(2,), seq=(3,) * ranks)  # no shard is empty: other ids are other ids on every rank
    case = make_case(layout, "uniform", experts=EXPERTS[ranks][0], num_choices=2, dim=7, width=7)
    for said in rank_pool.run(replay, ranks, case):
        assert said == {
            "saved == first": True,
            "saved is first": False,
            "other ids == first": False,
            "other dim == first": False,
            "equal to something else": False,
            "all frozen": True,
            "hashable": False,
            "needs a gradient": False,
        }


def plans_that_differ_on_one_sharding(rank: int) -> list[str]:
    """Layers of other experts, K, D and dtypes in turns, on one sharding object and on a fresh one each time."""

    def sharding() -> TokenSharding:
        return TokenSharding(batch=2, seq=Partition((3, 1)))

    shared, failures = sharding(), []
    for experts, num_choices, dim, dtype in 2 * list(
        product(((3, 1), (1, 3), (2, 300)), (1, 5), (1, 2), (torch.float32, torch.bfloat16))
    ):
        ids = torch.randint(-1, sum(experts), (*shared.local_shape(rank), num_choices))
        on_shared, on_fresh = (
            plan_dispatch(ids, dim=dim, sharding=cut, experts=Partition(experts), group=world(), dtype=dtype)
            for cut in (shared, sharding())
        )
        if on_shared != on_fresh:
            failures.append(f"{experts} {num_choices} {dim} {dtype}")
    return failures


def test_plans_of_different_layers_share_a_sharding(rank_pool: RankPool) -> None:
    assert rank_pool.run(plans_that_differ_on_one_sharding, 2) == [[], []]


def rows_of_many_experts(rank: int, sizes: tuple[int, int]) -> tuple[list[int], list[int], list[int]]:
    """Ids at both ends of both ranks' experts, and no expert, where ids start to need a second byte."""
    last = sum(sizes) - 1
    ids = torch.tensor([0, sizes[0] - 1, sizes[0], last, -1, last - 1]).view(1, 6, 1)
    sharding = TokenSharding(batch=1, seq=Partition((6, 0)))
    plan = plan_dispatch(sharding.shard(ids, rank), dim=1, sharding=sharding, experts=Partition(sizes), group=world())
    x_BlD = sharding.shard(torch.arange(6.0).view(1, 6, 1), rank)
    x_MD, _ = dispatch(x_BlD, x_BlD, plan)
    experts_of_rows = plan.rows_per_expert_e.nonzero()[:, 0].tolist()
    return experts_of_rows, plan.token_of_row_M.tolist(), x_MD[:, 0].int().tolist()


@pytest.mark.parametrize("sizes", [(200, 54), (200, 55), (200, 56), (200, 57), (3, 32763)])
def test_ids_at_the_ends_of_what_a_byte_and_two_can_say(rank_pool: RankPool, sizes: tuple[int, int]) -> None:
    last = sizes[1] - 1
    assert rank_pool.run(rows_of_many_experts, 2, sizes) == [
        ([0, sizes[0] - 1], [0, 1], [0, 1]),
        ([0, last - 1, last], [2, 5, 3], [2, 5, 3]),
    ]


def rows_of_crowded_token(rank: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Four choices of one token, all on rank 1, two of them the same expert."""
    sharding = TokenSharding(batch=1, seq=Partition((1, 0)))
    ids = torch.tensor([[[5, 3, 5, 4]]])[:, : 1 - rank]
    plan = plan_dispatch(ids, dim=3, sharding=sharding, experts=Partition((3, 3)), group=world())
    return plan.rows_sent, plan.rows_received, len(plan.token_of_row_M)


def test_a_token_crosses_to_a_rank_once(rank_pool: RankPool) -> None:
    assert rank_pool.run(rows_of_crowded_token, 2) == [((0, 1), (0, 0), 0), ((0, 0), (1, 0), 4)]


# ---- what a caller does with the results ---------------------------------------------------------------


def add_to_results_in_place(rank: int, static: bool) -> list[str]:
    """A residual added in place, to the rows and to the output, against the same out of place."""
    sharding, experts = TokenSharding(batch=2, seq=Partition((3, 2))), Partition((2, 1))
    torch.manual_seed(rank)
    expert_BlK = torch.rand(*sharding.local_shape(rank), 3).topk(2).indices
    weight_BlK = torch.rand(*sharding.local_shape(rank), 2, dtype=torch.float64)
    x_BlD = torch.randn(*sharding.local_shape(rank), 5, dtype=torch.float64, requires_grad=True)
    given = {"dim": 5, "sharding": sharding, "experts": experts, "group": world()}
    if static:
        plan = plan_static(expert_BlK, **given, sizes=StaticSizes(rows_per_pair=6, rows=20))
    else:
        plan = plan_dispatch(expert_BlK, **given)
    found = []
    for in_place in (True, False):
        x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
        x_MD = x_MD.add_(1) if in_place else x_MD + 1
        y_BlD = combine(x_MD, plan, weight_M)
        if in_place:
            y_BlD += x_BlD
        else:
            y_BlD = y_BlD + x_BlD
        found.append((y_BlD.detach(), torch.autograd.grad(y_BlD.square().sum(), x_BlD)[0]))
    return [name for name, one, other in zip(("y", "x"), *found, strict=True) if not one.equal(other)]


@pytest.mark.parametrize("static", [False, True])
def test_results_can_be_written_to(rank_pool: RankPool, static: bool) -> None:
    assert rank_pool.run(add_to_results_in_place, 2, static) == [[], []]
