"""One MoE layer on ranks and in one process: cases, what each got, and whether both are equal."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dispatch import Counted, GroupedExperts, MoE, Partition, StaticSizes, SwiGLU, TokenSharding, TopKRouter
from moe_dispatch.plan.planner import Planner
from moe_dispatch.reference import ReferenceMoE
from tests.support.dispatch.checkpoints import Run, plainly
from tests.support.ranks import world

DIM, HIDDEN = 8, 12
COUNTED = Counted()
# Relative to the largest value of its kind. Measured: float64 1e-15, float32 6e-7.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 6e-6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One layer on one layout: the same value, and so the same numbers, on every rank and in the test."""

    seq: tuple[int, ...]
    experts: tuple[int, ...]
    batch: tuple[int, ...] = (2,)
    held: tuple[tuple[int, ...], ...] | None = None
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
        return TokenSharding(batch=Partition(self.batch), seq=Partition(self.seq), held=self.held, order=self.order)

    @property
    def sizes(self) -> StaticSizes:
        """For a plan of fixed sizes: always enough."""
        tokens = self.sharding
        return StaticSizes(rows_per_pair=max(*tokens.local_sizes, 1), rows=max(tokens.num_tokens * self.top_k, 1))

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

    def layer(self, rank: int, group: dist.ProcessGroup | None = None, planner: Planner = COUNTED) -> MoE:
        """The layer with this rank's experts."""
        router, whole, shared = self.parts()
        experts = GroupedExperts(self.experts[rank], DIM, HIDDEN).to(self.dtype)
        experts.load_state_dict(self.mine(whole.state_dict(), rank))
        group = group or world()
        return MoE(
            router=router, experts=experts, partition=self.partition, group=group, shared=shared, planner=planner
        )

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
    return run_moe(rank, case, case.layer(rank))


def run_moe(rank: int, case: Case, moe: MoE, run: Run = plainly) -> Outcome:
    """Forward by ``run`` and backward of this rank's part of a case."""
    x_BlD, pull_BlD, pull_BlE = case.shards(rank)
    results = run(moe, x_BlD, case.sharding)
    pull(results, pull_BlD, pull_BlE).backward()
    return outcome(moe, x_BlD, results)


@cache  # the same for every kind of plan and every way to run
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
    Case(seq=(2, 1, 2, 1), held=((0, 3), (), (2, 1)), experts=(2, 0, 3), batch=(3,)),
    Case(seq=(2, 2, 1, 2), held=((3, 0), (1, 2)), batch=(2, 1), experts=(1, 2, 0, 3), order="LB", top_k=3),
]


class Stage(nn.Module):
    """Of a pipeline."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x_BlD: Tensor, sharding: TokenSharding) -> Tensor:
        return x_BlD + self.moe(x_BlD, sharding=sharding)[0]
