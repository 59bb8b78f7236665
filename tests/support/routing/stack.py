"""Several MoE layers one after the other, on ranks and in one process: what is recorded in one and replayed in
another."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dispatch import Counted, MoE, RoutingRecord, TokenSharding, record_routing
from moe_dispatch.plan.planner import Planner
from moe_dispatch.testing import RankThreads
from tests.support.dispatch.checkpoints import Run, plainly
from tests.support.dispatch.moe import DIM, Case, assert_close, gradients_of
from tests.support.ranks import world
from tests.support.tensors import grad_of

COUNTED = Counted()
NUM_LAYERS = 2
NAMES = [f"layers.{i}" for i in range(NUM_LAYERS)]


class Stack(nn.Module):
    """Norm, MoE, residual, so that a token that goes elsewhere in one layer is another in the next."""

    def __init__(self, layers: Sequence[MoE], run: Run = plainly) -> None:
        super().__init__()
        self.layers, self.run = nn.ModuleList(layers), run

    def forward(self, x_BlD: Tensor, sharding: TokenSharding) -> Tensor:
        for layer in self.layers:
            x_BlD = x_BlD + self.run(cast(MoE, layer), F.rms_norm(x_BlD, (DIM,)), sharding)[0]
        return x_BlD


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one rank, or the one process, got."""

    y_BlD: Tensor
    dx_BlD: Tensor
    gradients: dict[str, Tensor]
    loads: list[list[int]]


def assert_equal(got: Found, want: Found, tolerance: float) -> None:
    for name in ("y_BlD", "dx_BlD"):
        assert_close(getattr(got, name), getattr(want, name), tolerance, name)
    assert got.gradients.keys() == want.gradients.keys()
    for name in want.gradients:
        assert_close(got.gradients[name], want.gradients[name], tolerance, name)
    assert got.loads == want.loads


def of_layer(case: Case, index: int) -> Case:
    return replace(case, seed=case.seed + 10 * index)


def stack_of(case: Case, rank: int, run: Run = plainly, planner: Planner = COUNTED) -> Stack:
    return Stack([of_layer(case, i).layer(rank, planner=planner) for i in range(NUM_LAYERS)], run)


@torch.no_grad()
def move(layers: nn.ModuleList | Sequence[nn.Module]) -> None:
    """What training does to a router between the record and its replay, and more: most tokens would go elsewhere."""
    for layer in layers:
        router = layer.get_submodule("router")
        weight_ED, bias_E = router.get_parameter("weight_ED"), router.get_buffer("expert_bias_E")
        weight_ED.copy_(weight_ED.roll(1, 0) * 1.5)
        bias_E.copy_(bias_E.flip(0))


def inputs(case: Case, forward: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens of the whole grid and what pulls at the outputs, other ones for each forward."""
    x_BLD, pull_BLD, _ = replace(case, seed=case.seed + forward).inputs()
    return x_BLD, pull_BLD


def one_process(case: Case) -> Case:
    """The same batch and model on one rank."""
    experts = (sum(case.experts),)
    return replace(case, seq=(sum(case.seq),), batch=(sum(case.batch),), experts=experts, held=None, order="BL")


def as_order(whole_BLD: Tensor, case: Case) -> Tensor:
    """A batch-first tensor in the order of a case, or one in its order as batch-first."""
    return whole_BLD if case.order == "BL" else whole_BLD.transpose(0, 1)


Ran = list[tuple[Tensor, Tensor, Tensor]]


def run_forwards(stack: nn.Module, case: Case, rank: int, forwards: int = 1) -> Ran:
    """Output, input and what pulls at the output, of each forward of this rank's part."""
    ran = []
    for forward in range(forwards):
        whole = (as_order(x_BLD, case) for x_BLD in inputs(one_process(case), forward))
        x_BlD, pull_BlD = (case.sharding.shard(x_BLD, rank).clone() for x_BLD in whole)
        ran.append((stack(x_BlD.requires_grad_(), case.sharding), x_BlD, pull_BlD))
    return ran


def run_backwards(stack: Stack, ran: Ran) -> Found:
    """Outputs and input gradients one behind the other."""
    for y_BlD, _, pull_BlD in ran:
        (y_BlD * pull_BlD).sum().backward()
    return Found(
        y_BlD=torch.cat([y_BlD.detach() for y_BlD, _, _ in ran], dim=-1),
        dx_BlD=torch.cat([grad_of(x_BlD) for _, x_BlD, _ in ran], dim=-1),
        gradients=gradients_of(stack),
        loads=[layer.get_buffer("load_E").tolist() for layer in stack.layers],
    )


def train(stack: Stack, case: Case, rank: int, forwards: int = 1) -> Found:
    """Forwards and then backwards of this rank's part."""
    return run_backwards(stack, run_forwards(stack, case, rank, forwards))


def together(case: Case, found: Sequence[Found]) -> Found:
    """What the ranks got, as one process would have it."""
    whole = {
        name: as_order(case.sharding.unshard([getattr(one, name) for one in found]), case)
        for name in ("y_BlD", "dx_BlD")
    }
    gradients = {}
    for name in found[0].gradients:
        parts = [one.gradients[name] for one in found]
        gradients[name] = torch.cat(parts) if ".experts." in name else torch.stack(parts).sum(0)
    loads = [
        [sum(counts) for counts in zip(*layers, strict=True)]
        for layers in zip(*(x.loads for x in found), strict=True)
    ]
    return Found(**whole, gradients=gradients, loads=loads)


def reference(case: Case, record: RoutingRecord, *, moved: bool) -> Found:
    """One process, with the experts of a record, by the loops of the reference, which knows no records."""
    layers = [of_layer(one_process(case), i).reference() for i in range(NUM_LAYERS)]
    if moved:
        move(layers)
    ys, dxs = [], []
    for forward in range(len(record.layers[NAMES[0]])):
        x_BLD, pull_BLD = inputs(one_process(case), forward)
        y_BLD = x_BLD.requires_grad_()
        for name, layer in zip(NAMES, layers, strict=True):
            choices = record.layers[name][forward]
            expert_BLK = choices.expert_NK.to(torch.int64).unflatten(0, choices.grid)
            y_BLD = y_BLD + layer(F.rms_norm(y_BLD, (DIM,)), expert_BLK=expert_BLK)[0]
        (y_BLD * pull_BLD).sum().backward()
        ys.append(y_BLD.detach())
        dxs.append(grad_of(x_BLD))
    gradients = {f"layers.{i}.{name}": x for i, layer in enumerate(layers) for name, x in gradients_of(layer).items()}
    loads = [list(map(int, layer.load_E)) for layer in layers]
    return Found(y_BlD=torch.cat(ys, -1), dx_BlD=torch.cat(dxs, -1), gradients=gradients, loads=loads)


def recorded(rank: int, case: Case, forwards: int = 1) -> tuple[Found, RoutingRecord]:
    """What a rank gets without a replay, and the record of all ranks."""
    stack = stack_of(case, rank)
    with record_routing(stack) as record:
        found = train(stack, case, rank, forwards)
    return found, record.gather(world())


def record_of(threads: RankThreads, case: Case, forwards: int = 1) -> RoutingRecord:
    """What the ranks of a case record, the same on each."""
    first, *others = [record for _, record in threads.run(recorded, case.ranks, case, forwards)]
    assert all(other == first for other in others)
    return first


CASES = [
    Case(seq=(3, 2), experts=(2, 3), score="softmax"),
    Case(seq=(0, 4), experts=(4, 0), top_k=3, order="LB", batch=(3,)),
    Case(seq=(3, 1, 0, 2), experts=(2, 1, 0, 3), top_k=3, normalize=False),
    Case(seq=(3, 2), batch=(2, 1), experts=(3, 0, 2, 1), order="LB", groups=3, limited_groups=2),
    Case(seq=(4, 0), batch=(1, 2), experts=(2, 2, 2, 2)),
    Case(seq=(2, 1, 2, 1), held=((0, 3), (), (2, 1)), experts=(2, 0, 3)),
    Case(seq=(2, 2, 1, 2), held=((3, 0), (1, 2)), experts=(2, 3), order="LB"),
]
