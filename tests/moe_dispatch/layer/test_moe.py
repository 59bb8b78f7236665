"""The MoE layer over ranks against one process: outputs, every gradient, recomputation, state, refusals."""

import copy
import gc
import io
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_dispatch import GroupedExperts, MoE, Partition, SwiGLU, TokenSharding, TopKRouter, build_mesh
from moe_dispatch.layer.recompute import ForwardMemory
from moe_dispatch.reference import ReferenceMoE
from moe_dispatch.testing import RankPool

DIM, HIDDEN = 8, 12
# Relative to the largest value of its kind. Measured: float64 1e-15, float32 6e-7.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 6e-6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One layer on one layout: the same value, and so the same numbers, on every rank and in the test."""

    seq: tuple[int, ...]
    experts: tuple[int, ...]
    batch: tuple[int, ...] = (2,)
    order: Literal["BL", "LB"] = "BL"
    top_k: int = 2
    score: Literal["softmax", "sigmoid"] = "sigmoid"
    groups: int = 1
    limited_groups: int = 1
    judged_by: int = 2
    normalize: bool = True
    shared: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def __str__(self) -> str:
        values = {part.name: (getattr(self, part.name), part.default) for part in fields(self)}
        return ", ".join(f"{name}={value}" for name, (value, default) in values.items() if value != default)

    @property
    def ranks(self) -> int:
        return len(self.experts)

    @property
    def partition(self) -> Partition:
        return Partition(self.experts)

    @property
    def sharding(self) -> TokenSharding:
        return TokenSharding(batch=Partition(self.batch), seq=Partition(self.seq), order=self.order)

    def parts(self) -> tuple[TopKRouter, GroupedExperts, SwiGLU | None]:
        """Router, all of the experts, shared experts."""
        torch.manual_seed(self.seed)
        router = TopKRouter(
            DIM,
            self.partition.total,
            self.top_k,
            score=self.score,
            groups=self.groups,
            limited_groups=self.limited_groups,
            judged_by=self.judged_by,
            normalize=self.normalize,
            route_scale=2.5,
        )
        experts = GroupedExperts(self.partition.total, DIM, HIDDEN)
        shared = SwiGLU(DIM, HIDDEN) if self.shared else None
        router.expert_bias_E.copy_(torch.randn(self.partition.total) / 8)
        return router.to(self.dtype), experts.to(self.dtype), shared.to(self.dtype) if shared else None

    def layer(self, rank: int, group: dist.ProcessGroup | None = None) -> MoE:
        """The layer with this rank's experts."""
        router, whole, shared = self.parts()
        experts = GroupedExperts(self.experts[rank], DIM, HIDDEN).to(self.dtype)
        experts.load_state_dict(self.mine(whole.state_dict(), rank))
        group = group or world()
        return MoE(router=router, experts=experts, partition=self.partition, group=group, shared=shared)

    def mine(self, state: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
        """A state dict of all experts cut to those of the rank."""
        first = sum(self.experts[:rank])
        return {
            name: value[first : first + self.experts[rank]] if re.search("_e[DF][DF]$", name) else value
            for name, value in state.items()
        }

    def reference(self) -> ReferenceMoE:
        router, experts, shared = self.parts()
        return ReferenceMoE(router=router, experts=experts, shared=shared)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of the whole grid, and what pulls at the outputs and at the scores."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        widths = (DIM, DIM, self.partition.total)
        x_BLD, pull_BLD, pull_BLE = (
            torch.randn(*self.sharding.global_shape, width, generator=generator, dtype=torch.float64).to(self.dtype)
            for width in widths
        )
        return x_BLD, pull_BLD, pull_BLE

    def shards(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's part of the inputs; the first wants a gradient."""
        x_BlD, pull_BlD, pull_BlE = (self.sharding.shard(whole, rank).clone() for whole in self.inputs())
        return x_BlD.requires_grad_(), pull_BlD, pull_BlE


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one rank, or the one process, got."""

    y_BlD: Tensor
    scores_BlE: Tensor
    dx_BlD: Tensor
    gradients: dict[str, Tensor]
    load: list[int] = field(default_factory=list)


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient; a missing one fails here."""
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad.clone()
    return found


def outcome(module: MoE | ReferenceMoE, x_BlD: Tensor, results: tuple[Tensor, Tensor]) -> Outcome:
    """After backward."""
    assert x_BlD.grad is not None
    load = module.load_E.tolist() if isinstance(module.load_E, Tensor) else module.load_E
    return Outcome(
        y_BlD=results[0].detach(),
        scores_BlE=results[1].detach(),
        dx_BlD=x_BlD.grad.clone(),
        gradients=gradients_of(module),
        load=list(load),
    )


def pull(results: tuple[Tensor, Tensor], pull_BlD: Tensor, pull_BlE: Tensor) -> Tensor:
    """A loss that reaches outputs and scores."""
    return (results[0] * pull_BlD).sum() + (results[1] * pull_BlE).sum()


def run_layer(rank: int, case: Case) -> Outcome:
    """Forward and backward of this rank's part."""
    moe, (x_BlD, pull_BlD, pull_BlE) = case.layer(rank), case.shards(rank)
    results = moe(x_BlD, sharding=case.sharding)
    pull(results, pull_BlD, pull_BlE).backward()
    return outcome(moe, x_BlD, results)


def one_process(case: Case) -> Outcome:
    """The same in one process."""
    reference, (x_BLD, pull_BLD, pull_BLE) = case.reference(), case.inputs()
    x_BLD.requires_grad_()
    results = reference(x_BLD)
    pull(results, pull_BLD, pull_BLE).backward()
    return outcome(reference, x_BLD, results)


def together(case: Case, outcomes: Sequence[Outcome]) -> Outcome:
    """What the ranks got, as one process would have it: tokens in place, experts in a row, the rest summed."""
    unshard = case.sharding.unshard
    gradients = {}
    for name in outcomes[0].gradients:
        parts = [one.gradients[name] for one in outcomes]
        gradients[name] = torch.cat(parts) if name.startswith("experts.") else torch.stack(parts).sum(0)
    return Outcome(
        y_BlD=unshard([one.y_BlD for one in outcomes]),
        scores_BlE=unshard([one.scores_BlE for one in outcomes]),
        dx_BlD=unshard([one.dx_BlD for one in outcomes]),
        gradients=gradients,
        load=[sum(loads) for loads in zip(*(one.load for one in outcomes), strict=True)],
    )


def assert_close(got: Tensor, want: Tensor, tolerance: float, name: str) -> None:
    assert got.shape == want.shape, name
    assert got.dtype == want.dtype, name
    largest = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * largest, msg=lambda text: f"{name}: {text}")


def assert_equal_outcomes(got: Outcome, want: Outcome, tolerance: float) -> None:
    """``tolerance`` relative to the largest value of each quantity."""
    for name in ("y_BlD", "scores_BlE", "dx_BlD"):
        assert_close(getattr(got, name), getattr(want, name), tolerance, name)
    assert got.gradients.keys() == want.gradients.keys()
    for name in want.gradients:
        assert_close(got.gradients[name], want.gradients[name], tolerance, name)
    assert got.load == want.load


def assert_like_one_process(case: Case, outcomes: Sequence[Outcome]) -> None:
    assert_equal_outcomes(together(case, outcomes), one_process(case), TOLERANCE[case.dtype])


# ---- equal to one process --------------------------------------------------------------------------

CASES = [
    Case(seq=(5,), experts=(6,)),
    Case(seq=(5,), experts=(6,), order="LB", score="softmax", normalize=False, batch=(3,)),
    Case(seq=(3, 2), experts=(3, 3), batch=(3,)),
    Case(seq=(3, 2), experts=(1, 4), order="LB", top_k=3),
    Case(seq=(0, 4), experts=(4, 4), groups=4, limited_groups=2, judged_by=1, score="softmax"),
    Case(seq=(5, 0), experts=(0, 5), top_k=4, normalize=False),
    Case(seq=(4,), batch=(2, 1), experts=(4, 2), groups=3, limited_groups=2, top_k=3),
    Case(seq=(1, 0), experts=(2, 1), batch=(1,), top_k=1, normalize=False, shared=False),
    Case(seq=(3, 0, 2), experts=(2, 2, 2)),
    Case(seq=(3, 0, 2), experts=(5, 0, 1), order="LB", batch=(3,), top_k=4),
    Case(seq=(0, 7, 0), experts=(1, 3, 0), score="softmax", top_k=1),
    Case(seq=(1, 2, 1), experts=(3, 1, 4), groups=2, limited_groups=1, judged_by=2, top_k=4, shared=False),
    Case(seq=(3, 1, 0, 2), experts=(2, 2, 2, 2), groups=4, limited_groups=2, top_k=3),
    Case(seq=(3, 2), batch=(2, 1), experts=(3, 0, 2, 1), order="LB"),
    Case(seq=(3, 0), batch=(1, 2), experts=(0, 0, 5, 1), score="softmax", normalize=False, top_k=4),
    Case(seq=(1, 1, 1, 0), experts=(1, 1, 1, 1), order="LB", batch=(1,), top_k=4),
]


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    ranks = rng.randint(2, 4)
    groups = rng.choice((1, 2))
    marks = sorted(rng.randint(0, 4) for _ in range(ranks - 1))
    parts = [2 * (b - a) for a, b in itertools.pairwise([0, *marks, 4])]
    return Case(
        seq=(*(rng.choice((0, 1, 2, 4)) for _ in range(ranks - 1)), 1),
        batch=(rng.randint(1, 3),),
        experts=tuple(parts),
        order=rng.choice(("BL", "LB")),
        top_k=rng.randint(1, 4),
        score=rng.choice(("softmax", "sigmoid")),
        groups=groups,
        normalize=rng.random() < 0.5,
        shared=rng.random() < 0.5,
        seed=seed,
    )


@pytest.mark.parametrize("case", CASES + [random_case(seed) for seed in range(12)], ids=str)
def test_ranks_equal_one_process(case: Case, rank_pool: RankPool) -> None:
    assert_like_one_process(case, rank_pool.run(run_layer, case.ranks, case))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(100, 300))
def test_ranks_equal_one_process_in_many_cases(seed: int, rank_pool: RankPool) -> None:
    case = random_case(seed)
    assert_like_one_process(case, rank_pool.run(run_layer, case.ranks, case))


@pytest.mark.parametrize("case", [CASES[3], CASES[9], CASES[12]], ids=str)
def test_ranks_equal_one_process_in_float32(case: Case, rank_pool: RankPool) -> None:
    case = replace(case, dtype=torch.float32)
    assert_like_one_process(case, rank_pool.run(run_layer, case.ranks, case))


def test_the_reference_equals_a_dense_sum_over_all_experts() -> None:
    case = Case(seq=(5,), experts=(6,), top_k=3)
    router, experts, shared = case.parts()
    assert shared is not None
    x_BLD = case.inputs()[0]
    scores_BLE = (x_BLD @ router.weight_ED.T).sigmoid()
    chosen_BLE = torch.zeros_like(scores_BLE).scatter(-1, (scores_BLE + router.expert_bias_E).topk(3).indices, 1.0)
    weight_BLE = 2.5 * chosen_BLE * scores_BLE / (chosen_BLE * scores_BLE).sum(-1, keepdim=True)
    gate_BLEF, up_BLEF = (
        torch.einsum("bld,edf->blef", x_BLD, matrix) for matrix in (experts.gate_eDF, experts.up_eDF)
    )
    hidden_BLEF = gate_BLEF * gate_BLEF.sigmoid() * up_BLEF
    y_BLD = torch.einsum("ble,blef,efd->bld", weight_BLE, hidden_BLEF, experts.down_eFD) + shared(x_BLD)
    got_BLD, got_scores_BLE = case.reference()(x_BLD)
    assert_close(got_BLD, y_BLD, 1e-12, "y")
    assert_close(got_scores_BLE, scores_BLE, 1e-12, "scores")


def nothing_to_do(rank: int, seq: tuple[int, ...]) -> tuple[Outcome, float]:
    """A whole batch without tokens, then a sum that every rank has to reach."""
    found = run_layer(rank, Case(seq=seq, experts=(2, 3)))
    total = torch.ones(())
    dist.all_reduce(total)
    return found, total.item()


@pytest.mark.parametrize("seq", [(0, 0), (0, 3)])
def test_a_rank_without_tokens_takes_part_and_has_zero_gradients(seq: tuple[int, int], rank_pool: RankPool) -> None:
    outcomes, totals = zip(*rank_pool.run(nothing_to_do, 2, seq), strict=True)
    assert totals == (2.0, 2.0)
    assert outcomes[0].y_BlD.shape == outcomes[0].dx_BlD.shape == (2, 0, DIM)
    for name, gradient in outcomes[0].gradients.items():
        if not name.startswith("experts."):
            assert gradient.count_nonzero() == 0, name
    served = outcomes[0].gradients["experts.gate_eDF"]
    assert (served.count_nonzero() > 0) == (sum(seq) > 0)


def test_the_reference_takes_a_batch_without_tokens() -> None:
    case = Case(seq=(0,), experts=(3,))
    y_BLD, scores_BLE = case.reference()(torch.zeros(2, 0, DIM, dtype=torch.float64))
    assert y_BLD.shape == (2, 0, DIM)
    assert scores_BLE.shape == (2, 0, 3)


def run_strided(rank: int, case: Case) -> tuple[Outcome, Outcome]:
    """The same tokens contiguous, and as every other column of a transposed tensor."""
    moe, (x_BlD, pull_BlD, pull_BlE) = case.layer(rank), case.shards(rank)
    wide_DlB2 = torch.stack([x_BlD.detach(), torch.full_like(x_BlD, torch.nan)], dim=-1).permute(2, 1, 0, 3)
    strided_BlD = wide_DlB2.contiguous()[..., 0].permute(2, 1, 0).requires_grad_()
    results = moe(strided_BlD, sharding=case.sharding)
    pull(results, pull_BlD, pull_BlE).backward()
    return run_layer(rank, case), outcome(moe, strided_BlD, results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokens_may_be_strided(dtype: torch.dtype, rank_pool: RankPool) -> None:
    case = Case(seq=(3, 2), experts=(2, 3), dtype=dtype)
    for plain, strided in rank_pool.run(run_strided, 2, case):
        assert_equal_outcomes(strided, plain, TOLERANCE[dtype])


def rows_of_experts(rank: int, case: Case) -> Tensor:
    """What this rank's experts were given."""
    moe, seen = case.layer(rank), []
    moe.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    moe(case.shards(rank)[0], sharding=case.sharding)
    return seen[0]


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[9], CASES[13]], ids=str)
def test_experts_see_their_rows_in_global_token_order(case: Case, rank_pool: RankPool) -> None:
    router, x_TD = case.parts()[0], case.inputs()[0].flatten(0, 1)
    expert_TK = router.choose(router(x_TD))
    want = [x_TD[(expert_TK == expert).any(1)] for expert in range(case.partition.total)]
    assert torch.equal(torch.cat(rank_pool.run(rows_of_experts, case.ranks, case)), torch.cat(want))


def same_expert_for_all(rank: int, expert: int) -> list[Tensor | None]:
    """Every choice of every token on one expert: most ranks get no row. Then y.sum(), whose gradient is expanded."""
    case = Case(seq=(3, 2), experts=(2, 2), dtype=torch.float32, shared=False)
    moe, (x_BlD, _, _) = case.layer(rank), case.shards(rank)
    moe.router.choose = lambda scores_BlE: torch.full((*scores_BlE.shape[:2], 2), expert)
    moe(x_BlD, sharding=case.sharding)[0].sum().backward()
    return [parameter.grad for parameter in moe.experts.parameters()]


def test_all_rows_on_one_expert_leave_zero_gradients_on_the_others(rank_pool: RankPool) -> None:
    for rank, grads in enumerate(rank_pool.run(same_expert_for_all, 2, 3)):
        for grad_eDF in grads:
            assert grad_eDF is not None
            assert [bool(grad.count_nonzero()) for grad in grad_eDF] == [False, rank == 1]


def no_expert_for_some(rank: int) -> tuple[Tensor, Tensor, list[int]]:
    """A router that gives token 0 of every rank no expert at all, and the others one instead of two."""
    case = Case(seq=(3, 2), experts=(2, 2), shared=False, normalize=False)
    moe, (x_BlD, _, _) = case.layer(rank), case.shards(rank)
    choose = moe.router.choose

    def choose_less(scores_BlE: Tensor) -> Tensor:
        expert_BlK = choose(scores_BlE)
        expert_BlK[..., 1] = -1
        expert_BlK[0, 0] = -1
        return expert_BlK

    moe.router.choose = choose_less
    y_BlD, _ = moe(x_BlD, sharding=case.sharding)
    y_BlD.sum().backward()
    assert x_BlD.grad is not None
    return y_BlD.detach(), x_BlD.grad, moe.load_E.tolist()


def test_a_router_may_name_no_expert(rank_pool: RankPool) -> None:
    for (y_BlD, dx_BlD, load), tokens in zip(rank_pool.run(no_expert_for_some, 2), (6, 4), strict=True):
        assert y_BlD[0, 0].count_nonzero() == dx_BlD[0, 0].count_nonzero() == 0
        assert all(y_D.count_nonzero() for y_D in y_BlD.flatten(0, 1)[1:])
        assert sum(load) == tokens - 1


# ---- exchanges and recomputation -------------------------------------------------------------------


@contextmanager
def recorded_exchanges() -> Iterator[list[str]]:
    """The all-to-alls, in order: "routing" is one run of bytes, "rows" has a row per token."""
    kinds: list[str] = []
    all_to_all_single = dist.all_to_all_single

    def recorded(out: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> Any:
        kinds.append("routing" if sent.ndim == 1 else "rows")
        return all_to_all_single(out, sent, *args, **kwargs)

    dist.all_to_all_single = recorded
    try:
        yield kinds
    finally:
        dist.all_to_all_single = all_to_all_single


def permute_second_choice(router: TopKRouter) -> list[int]:
    """Make the router answer differently from its second call on; the list has an entry per call."""
    calls: list[int] = []
    choose = router.choose

    def permuted(scores_BlE: Tensor) -> Tensor:
        calls.append(len(calls))
        return (choose(scores_BlE) + len(calls) - 1) % router.num_experts

    router.choose = permuted
    return calls


Run = Callable[[MoE, Tensor, TokenSharding], tuple[Tensor, Tensor]]


def plainly(moe: MoE, x_BlD: Tensor, sharding: TokenSharding) -> tuple[Tensor, Tensor]:
    return moe(x_BlD, sharding=sharding)


def recomputed(moe: MoE, x_BlD: Tensor, sharding: TokenSharding) -> tuple[Tensor, Tensor]:
    return checkpoint(moe, x_BlD, sharding=sharding, use_reentrant=False)  # pyright: ignore[reportReturnType]


def recomputed_reentrantly(moe: MoE, x_BlD: Tensor, sharding: TokenSharding) -> tuple[Tensor, Tensor]:
    def forward(x_BlD: Tensor) -> tuple[Tensor, Tensor]:
        return moe(x_BlD, sharding=sharding)

    return checkpoint(forward, x_BlD, use_reentrant=True)  # pyright: ignore[reportReturnType]


def recomputed_inside_recomputed(moe: MoE, x_BlD: Tensor, sharding: TokenSharding) -> tuple[Tensor, Tensor]:
    def outer(x_BlD: Tensor) -> tuple[Tensor, Tensor]:
        y_BlD, scores_BlE = recomputed(moe, x_BlD, sharding)
        return y_BlD * 1.0, scores_BlE * y_BlD.new_ones(1)

    return checkpoint(outer, x_BlD, use_reentrant=False)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """An outcome and the exchanges that led to it."""

    outcome: Outcome
    forward: list[str]
    backward: list[str]
    chosen: int
    forgotten: bool  # nothing of the forward is remembered after it


def traced(rank: int, case: Case, run: Run, restless: bool = False) -> Traced:
    """Forward and backward by ``run``; a ``restless`` router answers differently on its second call."""
    moe, (x_BlD, pull_BlD, pull_BlE) = case.layer(rank), case.shards(rank)
    calls = permute_second_choice(moe.router) if restless else []
    with recorded_exchanges() as forward:
        results = run(moe, x_BlD, case.sharding)
    with recorded_exchanges() as backward:
        pull(results, pull_BlD, pull_BlE).backward()
    found = outcome(moe, x_BlD, results)
    del results
    return Traced(
        outcome=found, forward=forward, backward=backward, chosen=len(calls), forgotten=is_empty(moe._plans)
    )


def is_empty(memory: ForwardMemory[Any]) -> bool:
    if memory._made or memory._recalled:
        gc.collect()  # a graph may hold itself
    return not memory._made and not memory._recalled


def recompute_cases() -> list[Case]:
    """With and without something to recompute after the last exchange; empty shards, a rank without experts."""
    return [
        Case(seq=(3, 2), experts=(2, 3)),
        Case(seq=(3, 2), experts=(2, 3), shared=False, order="LB"),
        Case(seq=(0, 4), experts=(0, 4), shared=False),
        Case(seq=(3, 0, 2), experts=(2, 2, 0), top_k=3),
        Case(seq=(5, 0), experts=(3, 3), dtype=torch.float32),
    ]


@pytest.mark.parametrize("case", recompute_cases(), ids=str)
def test_three_exchanges_forward_and_two_backward(case: Case, rank_pool: RankPool) -> None:
    for found in rank_pool.run(traced, case.ranks, case, plainly):
        assert found.forward == ["routing", "rows", "rows"]
        assert found.backward == ["rows", "rows"]


@pytest.mark.parametrize("restless", [False, True])
@pytest.mark.parametrize("case", recompute_cases(), ids=str)
def test_a_recomputation_takes_the_plan_of_its_forward(case: Case, restless: bool, rank_pool: RankPool) -> None:
    plain = rank_pool.run(traced, case.ranks, case, plainly)
    again = rank_pool.run(traced, case.ranks, case, recomputed, restless)
    # Nothing after the experts has to be recomputed (the shared ones come before), so no rows are brought back.
    exchanges = 3
    for one, other in zip(plain, again, strict=True):
        assert_equal_outcomes(other.outcome, one.outcome, 0.0)
        assert other.forward == ["routing", "rows", "rows"]
        assert other.backward == ["rows"] * exchanges
        assert other.forgotten
        assert other.chosen == restless


@pytest.mark.parametrize("case", recompute_cases(), ids=str)
def test_a_reentrant_recomputation_routes_again_to_the_same_result(case: Case, rank_pool: RankPool) -> None:
    plain = rank_pool.run(traced, case.ranks, case, plainly)
    again = rank_pool.run(traced, case.ranks, case, recomputed_reentrantly)
    for one, other in zip(plain, again, strict=True):
        assert_equal_outcomes(other.outcome, one.outcome, 0.0)  # with it the load, counted once
        assert other.forgotten


def refusal_of_nested_checkpoints(rank: int, case: Case) -> str:
    moe, (x_BlD, _, _) = case.layer(rank), case.shards(rank)
    y_BlD, _ = recomputed_inside_recomputed(moe, x_BlD, case.sharding)
    try:
        y_BlD.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_checkpoint_inside_a_checkpoint_is_refused_before_it_routes_again(rank_pool: RankPool) -> None:
    case = recompute_cases()[0]
    for text in rank_pool.run(refusal_of_nested_checkpoints, case.ranks, case):
        assert text.startswith("an MoE layer inside a checkpoint inside a checkpoint: the recomputation of the outer")


def all_scores_tie(rank: int, case: Case, run: Run) -> Outcome:
    moe, (x_BlD, pull_BlD, pull_BlE) = case.layer(rank), case.shards(rank)
    with torch.no_grad():
        moe.router.weight_ED.zero_()
        moe.router.expert_bias_E.zero_()
    results = run(moe, x_BlD, case.sharding)
    pull(results, pull_BlD, pull_BlE).backward()
    return outcome(moe, x_BlD, results)


def test_ties_are_broken_once(rank_pool: RankPool) -> None:
    case = Case(seq=(3, 2), experts=(2, 3))
    plain = rank_pool.run(all_scores_tie, 2, case, plainly)
    for one, other in zip(plain, rank_pool.run(all_scores_tie, 2, case, recomputed), strict=True):
        assert_equal_outcomes(other, one, 0.0)


def two_forwards(rank: int, run: Run, backward: tuple[int, int]) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """One layer, two batches, backwards in the given order: input gradients, parameter gradients, choices made."""
    case = Case(seq=(3, 2), experts=(2, 3))
    moe = case.layer(rank)
    calls = permute_second_choice(moe.router)
    shardings = [case.sharding, TokenSharding(batch=2, seq=Partition((0, 6)))]
    batches = [
        torch.randn(*sharding.local_shape(rank), DIM, dtype=torch.float64, requires_grad=True)
        for sharding in shardings
    ]
    losses = [run(moe, x_BlD, sharding)[0].square().sum() for x_BlD, sharding in zip(batches, shardings, strict=True)]
    for index in backward:
        losses[index].backward()
    grads = [x_BlD.grad for x_BlD in batches if x_BlD.grad is not None]
    return grads, gradients_of(moe), len(calls)


@pytest.mark.parametrize("backward", [(0, 1), (1, 0)])
def test_two_forwards_before_their_backwards_keep_their_plans(backward: tuple[int, int], rank_pool: RankPool) -> None:
    plain = rank_pool.run(two_forwards, 2, plainly, (0, 1))
    again = rank_pool.run(two_forwards, 2, recomputed, backward)
    for (want_grads, want_gradients, _), (grads, gradients, calls) in zip(plain, again, strict=True):
        assert calls == 2
        assert len(grads) == 2
        for got, want in zip(grads, want_grads, strict=True):
            assert_close(got, want, 0.0, "dx")
        for name in want_gradients:  # two gradients, added in either order
            assert_close(gradients[name], want_gradients[name], 1e-12, name)


class Block(nn.Module):
    """norm, MoE, residual; the MoE ``times`` times."""

    def __init__(self, moe: MoE, times: int) -> None:
        super().__init__()
        self.norm, self.moe, self.times = nn.RMSNorm(DIM, dtype=torch.float64), moe, times

    def forward(self, x_BlD: Tensor, sharding: TokenSharding) -> Tensor:
        for _ in range(self.times):
            x_BlD = x_BlD + self.moe(self.norm(x_BlD), sharding=sharding)[0]
        return x_BlD


def run_block(
    rank: int, times: int, checkpointed: bool, backwards: int
) -> tuple[Tensor, dict[str, Tensor], int, bool]:
    """dx, gradients, choices made, and whether nothing is remembered."""
    case = Case(seq=(3, 0, 2), experts=(2, 0, 3))
    block, (x_BlD, pull_BlD, _) = Block(case.layer(rank), times), case.shards(rank)
    calls: list[int] = []
    choose = block.moe.router.choose

    def answer(scores_BlE: Tensor) -> Tensor:  # each of the forward's calls has its own answer, later ones another
        calls.append(len(calls))
        return (choose(scores_BlE) + len(calls)) % block.moe.router.num_experts

    block.moe.router.choose = answer
    if checkpointed:
        y_BlD: Tensor = checkpoint(block, x_BlD, case.sharding, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
    else:
        y_BlD = block(x_BlD, case.sharding)
    for backward in range(backwards):
        (y_BlD * pull_BlD).sum().backward(retain_graph=backward + 1 < backwards)
    assert x_BlD.grad is not None
    del y_BlD
    return x_BlD.grad, gradients_of(block), len(calls), is_empty(block.moe._plans)


@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_checkpointed_block_and_a_kept_graph(times: int, backwards: int, rank_pool: RankPool) -> None:
    plain = rank_pool.run(run_block, 3, times, False, 1)
    again = rank_pool.run(run_block, 3, times, True, backwards)
    for (dx_BlD, gradients, _, _), (got_dx_BlD, got, calls, forgotten) in zip(plain, again, strict=True):
        assert calls == times
        assert forgotten
        assert_close(got_dx_BlD, backwards * dx_BlD, 1e-12, "dx")
        assert got.keys() == gradients.keys()
        for name, want in gradients.items():
            assert_close(got[name], backwards * want, 1e-12, name)


def left_behind(rank: int, grad: bool) -> bool:
    """Whether nothing is remembered after many forwards without a backward."""
    case = Case(seq=(2, 1), experts=(2, 2))
    moe, (x_BlD, _, _) = case.layer(rank), case.shards(rank)
    for _ in range(100):
        with torch.set_grad_enabled(grad):
            recomputed(moe, x_BlD, case.sharding)
    return is_empty(moe._plans)


@pytest.mark.parametrize("grad", [False, True])
def test_forwards_without_a_backward_leave_nothing_behind(grad: bool, rank_pool: RankPool) -> None:
    assert rank_pool.run(left_behind, 2, grad) == [True, True]


def test_a_checkpoint_that_hides_its_frame_is_refused() -> None:
    def pack(x: Tensor) -> Tensor:
        return x

    pack.__module__ = "torch.utils.checkpoint"
    memory: ForwardMemory[int] = ForwardMemory()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        pytest.raises(RuntimeError, match="checkpoints in a way that MoE does not know") as caught,
    ):
        memory.recall(lambda: 1)
    assert "leave MoE layers outside torch.utils.checkpoint, or use a torch version that" in str(caught.value)
    assert is_empty(memory)


def test_other_hooks_are_no_checkpoint() -> None:
    memory: ForwardMemory[int] = ForwardMemory()
    assert memory.recall(lambda: 1) == 1
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert memory.recall(lambda: 2) == 2
    with torch.autograd.graph.save_on_cpu():
        assert memory.recall(lambda: 3) == 3
    assert is_empty(memory)


def test_a_copied_memory_is_empty() -> None:
    memory: ForwardMemory[int] = ForwardMemory()
    x_D = torch.ones(3, requires_grad=True)
    made = []

    def forward(x_D: Tensor) -> Tensor:
        made.append(memory.recall(lambda: len(made)))
        return x_D.sin().cos()

    y_D = checkpoint(forward, x_D, use_reentrant=False)
    assert isinstance(y_D, Tensor)
    assert not is_empty(memory)
    assert is_empty(copy.deepcopy(memory))
    y_D.sum().backward()
    assert made == [0, 0]


# ---- load and bias ---------------------------------------------------------------------------------


def loads(rank: int) -> list[list[int]]:
    """load_E after training, evaluation, a checkpointed step, a bias update, and one more forward."""
    case = Case(seq=(3, 2), experts=(2, 2))
    moe, (x_BlD, _, _) = case.layer(rank), case.shards(rank)
    found = []

    def note() -> None:
        found.append(moe.load_E.tolist())

    moe(x_BlD, sharding=case.sharding)
    note()
    moe.eval()
    moe(x_BlD, sharding=case.sharding)
    recomputed(moe, x_BlD, case.sharding)[0].sum().backward()
    note()
    moe.train()
    recomputed(moe, x_BlD, case.sharding)[0].sum().backward()
    note()
    moe.update_bias(0.0, world())
    note()
    recomputed_reentrantly(moe, x_BlD, case.sharding)[0].sum().backward()
    note()
    assert moe.load_E.dtype == torch.int64
    return found


def test_choices_are_counted_once_and_only_in_training(rank_pool: RankPool) -> None:
    found = rank_pool.run(loads, 2)
    for (once, evaluated, twice, updated, reentrant), tokens in zip(found, (6, 4), strict=True):
        assert sum(once) == 2 * tokens
        assert evaluated == once
        assert twice == [2 * count for count in once]
        assert updated == [0] * 4
        assert reentrant == once
    case = Case(seq=(3, 2), experts=(2, 2))
    assert [sum(counts) for counts in zip(*(one[0] for one in found), strict=True)] == one_process(case).load


def test_the_reference_counts_in_training_and_starts_anew_after_an_update() -> None:
    case = Case(seq=(5,), experts=(4,))
    reference, (x_BLD, _, _) = case.reference(), case.inputs()
    reference(x_BLD)
    assert sum(reference.load_E) == 2 * 10
    reference.eval()(x_BLD)
    assert sum(reference.load_E) == 2 * 10
    reference.update_bias(0.05)
    assert reference.load_E == [0] * 4


def biases(rank: int, case: Case) -> list[list[float]]:
    """The bias after each of three steps on different tokens."""
    moe, found = case.layer(rank), []
    for step in range(3):
        x_BlD, _, _ = replace(case, seed=step).shards(rank)
        moe(x_BlD, sharding=case.sharding)
        moe.update_bias(0.05, world())
        found.append(moe.router.expert_bias_E.tolist())
    return found


@pytest.mark.parametrize(
    "case", [Case(seq=(5,), experts=(4,)), Case(seq=(4, 0), experts=(1, 3)), Case(seq=(3, 0, 2), experts=(0, 2, 2))]
)
def test_the_bias_moves_as_in_one_process(case: Case, rank_pool: RankPool) -> None:
    reference, want = case.reference(), []
    for step in range(3):
        reference(replace(case, seed=step).inputs()[0])
        reference.update_bias(0.05)
        want.append(reference.router.expert_bias_E.tolist())
    assert want[0] != want[1] != want[2]
    for found in rank_pool.run(biases, case.ranks, case):
        assert found == [pytest.approx(bias, rel=1e-12) for bias in want]


# ---- state -----------------------------------------------------------------------------------------


def state_and_copy(rank: int) -> tuple[list[str], Outcome, Outcome, bool]:
    """Names of the state dict; the outcome of a deep copy and of the original; whether the copy shares nothing."""
    case = Case(seq=(3, 2), experts=(2, 3))
    moe, (x_BlD, pull_BlD, pull_BlE) = case.layer(rank), case.shards(rank)
    copied = copy.deepcopy(moe)
    results = copied(x_BlD, sharding=case.sharding)
    pull(results, pull_BlD, pull_BlE).backward()
    apart = copied.group is moe.group and all(p.grad is None for p in moe.parameters())
    return list(moe.state_dict()), outcome(copied, x_BlD, results), run_layer(rank, case), apart


def test_a_deep_copy_computes_the_same(rank_pool: RankPool) -> None:
    for _, copied, original, apart in rank_pool.run(state_and_copy, 2):
        assert apart
        assert_equal_outcomes(copied, original, 0.0)


def saved_state(rank: int, case: Case) -> bytes:
    """This rank's state dict as a file, after a step that moved everything in it."""
    moe = case.layer(rank)
    moe(case.shards(rank)[0], sharding=case.sharding)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.mul_(1.5)
    moe.update_bias(0.25, world())
    file = io.BytesIO()
    torch.save(moe.state_dict(), file)
    return file.getvalue()


def run_loaded(rank: int, case: Case, state: dict[str, Tensor]) -> tuple[Outcome, dict[str, Tensor]]:
    """The outcome of a fresh layer, after it loaded its part of ``state``; and its state dict."""
    moe, (x_BlD, pull_BlD, pull_BlE) = replace(case, seed=99).layer(rank), case.shards(rank)
    moe.load_state_dict(case.mine(state, rank))
    results = moe(x_BlD, sharding=case.sharding)
    pull(results, pull_BlD, pull_BlE).backward()
    return outcome(moe, x_BlD, results), {name: value.clone() for name, value in moe.state_dict().items()}


def whole_state(files: Sequence[bytes]) -> dict[str, Tensor]:
    """The state dict with all experts, in the order of the ranks."""
    states = [torch.load(io.BytesIO(file)) for file in files]
    return {
        name: torch.cat([state[name] for state in states]) if ".experts." in f".{name}" else states[0][name]
        for name in states[0]
    }


@pytest.mark.parametrize(
    ("seq", "experts"), [((5,), (6,)), ((3, 2), (1, 5)), ((2, 1, 0, 2), (2, 2, 2, 0)), ((1, 1, 1, 2), (2, 1, 2, 1))]
)
def test_what_two_ranks_saved_any_number_of_ranks_loads(
    seq: tuple[int, ...], experts: tuple[int, ...], rank_pool: RankPool
) -> None:
    saved = Case(seq=(3, 2), experts=(3, 3))
    state = whole_state(rank_pool.run(saved_state, 2, saved))
    assert set(state) == {
        "router.weight_ED", "router.expert_bias_E", "experts.gate_eDF", "experts.up_eDF", "experts.down_eFD",
        "shared.gate.weight", "shared.up.weight", "shared.down.weight",
    }  # fmt: skip
    case = Case(seq=seq, experts=experts)
    outcomes, states = zip(*rank_pool.run(run_loaded, case.ranks, case, state), strict=True)
    for name, want in state.items():
        parts = [one[name] for one in states]
        for got in [torch.cat(parts)] if name.startswith("experts.") else parts:
            assert torch.equal(got, want), name
    reference, (x_BLD, pull_BLD, pull_BLE) = case.reference(), case.inputs()
    reference.load_state_dict(state)
    results = reference(x_BLD.requires_grad_())
    pull(results, pull_BLD, pull_BLE).backward()
    assert_equal_outcomes(together(case, outcomes), outcome(reference, x_BLD, results), 1e-12)


# ---- two layers in one process, and gradients over ranks -------------------------------------------

TWO = (
    Case(seq=(3, 2), experts=(2, 2), groups=2, limited_groups=1, judged_by=1, score="softmax"),
    Case(seq=(0, 4), experts=(1, 5), top_k=3, order="LB", batch=(3,), seed=7),
)


def two_layers(rank: int, run: Run, backward: tuple[int, int]) -> list[Outcome]:
    """Two unlike layers, forward one after the other, backward in the given order."""
    layers, shards = [case.layer(rank) for case in TWO], [case.shards(rank) for case in TWO]
    results = [run(moe, shard[0], case.sharding) for moe, shard, case in zip(layers, shards, TWO, strict=True)]
    for index in backward:
        pull(results[index], *shards[index][1:]).backward()
    return [outcome(layers[i], shards[i][0], results[i]) for i in range(2)]


@pytest.mark.parametrize("run", [plainly, recomputed])
@pytest.mark.parametrize("backward", [(0, 1), (1, 0)])
def test_unlike_layers_in_one_process_do_not_meet(run: Run, backward: tuple[int, int], rank_pool: RankPool) -> None:
    for case, *outcomes in zip(TWO, *rank_pool.run(two_layers, 2, run, backward), strict=True):
        assert_like_one_process(case, outcomes)


def global_norm(rank: int, case: Case) -> tuple[float, float]:
    """The norm of all gradients: those of replicated parameters summed first; each expert counted where it lives."""
    moe, (x_BlD, pull_BlD, pull_BlE) = case.layer(rank), case.shards(rank)
    pull(moe(x_BlD, sharding=case.sharding), pull_BlD, pull_BlE).backward()
    square, square_of_experts = torch.zeros((), dtype=case.dtype), torch.zeros((), dtype=case.dtype)
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None
        if name.startswith("experts."):
            square_of_experts += parameter.grad.square().sum()
        else:
            dist.all_reduce(parameter.grad)
            square += parameter.grad.square().sum()
    dist.all_reduce(square_of_experts)
    return (square + square_of_experts).sqrt().item(), square_of_experts.item()


@pytest.mark.parametrize("case", [CASES[2], CASES[9], CASES[13]], ids=str)
def test_the_norm_of_the_gradients_is_that_of_one_process(case: Case, rank_pool: RankPool) -> None:
    norms = rank_pool.run(global_norm, case.ranks, case)
    assert len(set(norms)) == 1
    gradients = one_process(case).gradients
    want = nn.utils.get_total_norm(gradients.values()).item()
    assert norms[0][0] == pytest.approx(want, rel=1e-12)
    assert norms[0][1] > 0


def run_sharded(rank: int, seq: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """Experts over ep = 2, and FSDP over the other two ranks: whole gradients of the experts of this ep row."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = build_mesh(dp=4, ep=2, device_type="cpu")
    group, sharding = mesh.expert.get_group("ep"), TokenSharding(batch=2, seq=Partition(seq))
    case = Case(seq=(2, 2), experts=(3, 2))
    moe = case.layer(group.rank(), group)
    fully_shard(moe.experts, mesh=mesh.expert["edp"])
    experts: nn.Module = moe.experts
    assert isinstance(experts, FSDPModule)
    experts.set_gradient_divide_factor(1.0)
    experts.set_force_sum_reduction_for_comms(True)
    whole_BLD, pull_BLD, pull_BLE = replace(case, seq=(sum(seq),)).inputs()
    x_BlD, pull_BlD, pull_BlE = (sharding.shard(whole, rank) for whole in (whole_BLD, pull_BLD, pull_BLE))
    x_BlD = x_BlD.clone().requires_grad_()
    pull(moe(x_BlD, sharding=sharding.select(mesh.ep_ranks)), pull_BlD, pull_BlE).backward()
    gradients = {
        name: gradient.full_tensor() if name.startswith("experts.") else gradient  # pyright: ignore[reportAttributeAccessIssue]
        for name, gradient in gradients_of(moe).items()
    }
    assert x_BlD.grad is not None
    return gradients, x_BlD.grad


@pytest.mark.parametrize("seq", [(2, 1, 3, 2), (3, 0, 0, 2), (0, 0, 4, 1)])
def test_experts_sharded_by_fsdp_have_the_gradients_of_one_process(seq: tuple[int, ...], rank_pool: RankPool) -> None:
    results = rank_pool.run(run_sharded, 4, seq)
    want = one_process(Case(seq=(sum(seq),), experts=(5,)))
    for name, gradient in want.gradients.items():
        parts = [found[name] for found, _ in results]
        if not name.startswith("experts."):
            assert_close(torch.stack(parts).sum(0), gradient, 1e-12, name)
            continue
        for row in (parts[:2], parts[2:]):  # ep rows 0 1 and 2 3, each with all experts
            assert_close(torch.cat(row), gradient, 1e-12, name)
    dx_BLD = TokenSharding(batch=2, seq=Partition(seq)).unshard([dx_BlD for _, dx_BlD in results])
    assert_close(dx_BLD, want.dx_BlD, 1e-12, "dx")


# ---- one rank's mistake ----------------------------------------------------------------------------

WRONG = Case(seq=(3, 0, 2), experts=(2, 2, 2))


def spoil(x_BlD: Tensor, sharding: TokenSharding, mistake: str) -> tuple[Tensor, TokenSharding]:
    """What the rank at fault passes."""
    if mistake == "nan":
        x_BlD = x_BlD.detach().clone()
        x_BlD[1, 1, 3] = torch.nan
    elif mistake == "one token less":
        x_BlD = x_BlD[:, :-1]
    elif mistake == "another width":
        x_BlD = x_BlD[..., :5]
    elif mistake == "no batch":
        x_BlD = x_BlD.flatten(0, 1)
    elif mistake == "integers":
        x_BlD = x_BlD.detach().to(torch.int64)
    elif mistake == "float32":
        x_BlD = x_BlD.detach().float()
    elif mistake == "no gradient":
        x_BlD = x_BlD.detach()
    elif mistake == "the other order":
        sharding = TokenSharding(batch=2, seq=sharding.seq, order="LB")
        x_BlD = x_BlD.transpose(0, 1)
    elif mistake == "the same sizes elsewhere":
        sharding = TokenSharding(batch=2, seq=Partition((3, 0, 2, 1))).select((0, 1, 2))
    return x_BlD, sharding


def refusal(rank: int, at_fault: int, mistake: str) -> tuple[str, Outcome]:
    """The text of the refusal, and a right forward and backward of the same layer afterwards."""
    moe, (x_BlD, pull_BlD, pull_BlE) = WRONG.layer(rank), WRONG.shards(rank)
    given_BlD, sharding = spoil(x_BlD, WRONG.sharding, mistake) if rank == at_fault else (x_BlD, WRONG.sharding)
    text = "no error"
    try:
        moe(given_BlD, sharding=sharding)
    except ValueError as error:
        text = str(error)
    moe.load_E.zero_()
    results = moe(x_BlD, sharding=WRONG.sharding)
    pull(results, pull_BlD, pull_BlE).backward()
    return text, outcome(moe, x_BlD, results)


SHARD = (
    "its shard in order 'BL' is (2, 3, 8), of a floating-point dtype: pass the tokens that the sharding gives this "
    "rank"
)


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        ("one token less", f"rank 0: x is (2, 2, 8) of torch.float64; {SHARD}"),
        ("another width", f"rank 0: x is (2, 3, 5) of torch.float64; {SHARD}"),
        ("no batch", f"rank 0: x is (6, 8) of torch.float64; {SHARD}"),
        ("integers", f"rank 0: x is (2, 3, 8) of torch.int64; {SHARD}"),
        (
            "nan",
            "rank 0: the weight at local token 4, choice 0 is NaN; look for NaN or Inf in the router's input",
        ),
    ],
)
def test_one_ranks_mistake_is_the_same_error_on_every_rank(mistake: str, text: str, rank_pool: RankPool) -> None:
    texts, outcomes = zip(*rank_pool.run(refusal, 3, 0, mistake), strict=True)
    assert texts == (text,) * 3
    assert_like_one_process(WRONG, outcomes)


@pytest.mark.parametrize("mistake", ["the other order", "the same sizes elsewhere", "float32"])
def test_ranks_that_disagree_are_told_so(mistake: str, rank_pool: RankPool) -> None:
    texts, outcomes = zip(*rank_pool.run(refusal, 3, 0, mistake), strict=True)
    assert len(set(texts)) == 1
    assert "the ranks disagree about one call" in texts[0]
    assert "[0]" in texts[0]
    assert "[1, 2]" in texts[0]
    assert_like_one_process(WRONG, outcomes)


def one_rank_without_gradient(rank: int, without: str) -> str:
    """What a layer with a frozen router says where tokens of rank 1, or its experts, need no gradient."""
    moe, (x_BlD, _, _) = WRONG.layer(rank), WRONG.shards(rank)
    moe.router.requires_grad_(False)
    if rank == 1:
        (x_BlD if without == "tokens" else moe.experts).requires_grad_(False)
    try:
        moe(x_BlD, sharding=WRONG.sharding)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("without", ["tokens", "experts"])
def test_a_rank_that_would_leave_backward_to_its_peers_is_told(without: str, rank_pool: RankPool) -> None:
    texts = rank_pool.run(one_rank_without_gradient, 3, without)
    assert len(set(texts)) == 1
    assert "the ranks disagree about one call" in texts[0]
    assert "gradients of tokens or weights True, of experts True" in texts[0]


# ---- autocast ------------------------------------------------------------------------------------------


def in_autocast(rank: int, case: Case) -> tuple[torch.dtype, Tensor, Tensor]:
    """Dtype of the output, the output, and the gradient of the tokens."""
    moe, (x_BlD, _, _) = case.layer(rank), case.shards(rank)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_BlD, _ = moe(x_BlD, sharding=case.sharding)
    y_BlD.sum().backward()
    assert x_BlD.grad is not None
    return y_BlD.dtype, y_BlD.detach(), x_BlD.grad


@pytest.mark.parametrize("experts", [(4, 0), (0, 4), (2, 2)])
def test_autocast_gives_what_it_gives_without_ranks_without_experts(
    experts: tuple[int, ...], rank_pool: RankPool
) -> None:
    case, one = (Case(seq=(3, 2), experts=sizes, dtype=torch.float32) for sizes in (experts, (4,)))
    one = replace(one, seq=(5,))
    ((dtype, y_BLD, grad_BLD),) = rank_pool.run(in_autocast, 1, one)
    found = rank_pool.run(in_autocast, 2, case)
    assert {each[0] for each in found} == {dtype} == {torch.float32}
    assert_close(torch.cat([each[1] for each in found], 1), y_BLD, 1e-6, "y")  # measured: 0
    assert_close(torch.cat([each[2] for each in found], 1), grad_BLD, 1e-6, "dx")


def test_a_mistake_of_the_last_rank_is_told_too(rank_pool: RankPool) -> None:
    for text, _ in rank_pool.run(refusal, 3, 2, "another width"):
        assert text.startswith("rank 2: x is (2, 2, 5) of torch.float64; its shard in order 'BL' is (2, 2, 8)")


def wrong_for_all(rank: int, kind: str) -> str:
    """Mistakes that every rank sees by itself."""
    case = Case(seq=(3, 2), experts=(2, 2))
    router, experts, _ = case.parts()
    mine = case.layer(rank).experts
    sharding = case.sharding
    try:
        if kind == "experts":
            MoE(router=router, experts=experts, partition=case.partition, group=world())
        elif kind == "router":
            MoE(router=TopKRouter(DIM, 3, 1, score="sigmoid"), experts=mine, partition=case.partition, group=world())
        elif kind == "partition":
            MoE(router=router, experts=mine, partition=Partition((2, 1, 1)), group=world())
        elif kind == "group":
            MoE(router=router, experts=mine, partition=case.partition, group=None)  # pyright: ignore[reportArgumentType]
        elif kind == "sharding":
            sharding = TokenSharding(batch=2, seq=Partition((2, 2, 1)))
            case.layer(rank)(torch.zeros(*sharding.local_shape(rank), DIM), sharding=sharding)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "experts",
            "a router over 4 experts and 4 experts on rank {rank}, but Partition(sizes=(2, 2)) has 4 experts, 2 of "
            "them here; build both from the partition",
        ),
        (
            "router",
            "a router over 3 experts and 2 experts on rank {rank}, but Partition(sizes=(2, 2)) has 4 experts, 2 of "
            "them here; build both from the partition",
        ),
        (
            "partition",
            "the partition of experts describes 3 ranks, but the group has 2; they have to be equal, one piece per "
            "rank in the group's rank order (for a group that is part of a mesh: sharding.select(ranks))",
        ),
        (
            "group",
            "group is None; pass the process group explicitly, e.g. torch.distributed.group.WORLD once "
            "init_process_group has run, or device_mesh.get_group()",
        ),
        (
            "sharding",
            "the token sharding describes 3 ranks, but the group has 2; they have to be equal, one piece per rank in "
            "the group's rank order (for a group that is part of a mesh: sharding.select(ranks))",
        ),
    ],
)
def test_what_every_rank_can_see_is_refused_before_any_exchange(kind: str, text: str, rank_pool: RankPool) -> None:
    assert rank_pool.run(wrong_for_all, 2, kind) == [text.format(rank=rank) for rank in range(2)]
