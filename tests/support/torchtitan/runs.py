"""Forward and backward of a block on one process, and over ranks."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.models.common.moe import MoE
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.integrations.torchtitan import MoEDispatchTokenDispatcher, known_tokens

from .block import DIM, EXPERT_WEIGHTS, new_block

Wrap = Callable[[MoE], nn.Module]


@dataclass(frozen=True, eq=False)
class Run:
    """Output, gradient of the tokens, and gradients of the weights by their names in the block."""

    y_BLD: Tensor
    dx_BLD: Tensor
    weights: dict[str, Tensor]

    @property
    def experts(self) -> list[Tensor]:
        """Gradients of the experts' weights."""
        return [gradient for name, gradient in self.weights.items() if name.endswith(EXPERT_WEIGHTS)]


@dataclass(frozen=True)
class Case:
    """The sequences are cut over all ranks, and experts over ``ep`` of them.

    Attributes:
        lengths: of each rank, of ``batch`` sequences.
        is_known: whether the dispatcher is given the grid.
        is_zigzag: whether the lengths are those of a zigzag order of the sequence.
    """

    batch: int
    lengths: tuple[int, ...]
    ep: int
    dtype: torch.dtype
    is_known: bool = True
    is_zigzag: bool = False

    @property
    def whole(self) -> TokenSharding:
        if self.is_zigzag:
            return TokenSharding.zigzag(batch=self.batch, length=sum(self.lengths), ranks=len(self.lengths))
        return TokenSharding(batch=self.batch, seq=Partition(self.lengths))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Tokens, and the gradient of the output."""
        generator = torch.Generator().manual_seed(11)
        x_BLD, dy_BLD = torch.randn(2, self.batch, sum(self.lengths), DIM, generator=generator).to(self.dtype)
        return x_BLD, dy_BLD


def run(module: nn.Module, x_BlD: Tensor, dy_BlD: Tensor, around: Any = None) -> Run:
    """Args:
    around: a context of the forward alone.
    """
    x_BlD = x_BlD.clone().requires_grad_()
    with around or nullcontext():
        y_BlD = module(x_BlD)
    y_BlD.backward(dy_BlD)
    assert x_BlD.grad is not None
    named = [(name[name.index("route") :], w.grad) for name, w in module.named_parameters()]
    return Run(y_BlD.detach(), x_BlD.grad, {name: grad for name, grad in named if grad is not None})


def on_one_process(case: Case, wrap: Wrap = lambda block: block) -> Run:
    """By torchtitan's own local dispatcher."""
    return run(wrap(new_block(LocalTokenDispatcher, case.dtype)), *case.grid())


def cut(block: MoE, ep: int, place: int) -> None:
    """This rank's experts, evenly, as torchtitan cuts them."""
    experts = block.routed_experts.inner_experts
    for name in EXPERT_WEIGHTS:
        share = experts.get_parameter(name).detach().chunk(ep)[place].clone()
        setattr(experts, name, nn.Parameter(share))


def block_over_ranks(case: Case) -> tuple[MoE, TokenSharding]:
    """This rank's, and the tokens of its expert-parallel group."""
    mesh = init_device_mesh("cpu", (len(case.lengths) // case.ep, case.ep), mesh_dim_names=("efsdp", "ep"))
    block = new_block(MoEDispatchTokenDispatcher, case.dtype)
    cut(block, case.ep, mesh["ep"].get_local_rank())
    block.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh["ep"])
    first = mesh["efsdp"].get_local_rank() * case.ep
    return block, case.whole.select(range(first, first + case.ep))


def over_ranks(rank: int, case: Case, wrap: Wrap = lambda block: block) -> Run:
    """This rank's part; gradients of experts are those of its group."""
    block, of_group = block_over_ranks(case)
    mine = [case.whole.shard(x, rank).contiguous() for x in case.grid()]
    return run(wrap(block), *mine, around=known_tokens(of_group, block) if case.is_known else None)


def together(runs: Sequence[Run], case: Case) -> Run:
    """The runs of all ranks as that of one process."""

    def whole(name: str) -> Tensor:
        of_rank = [run.weights[name] for run in runs]
        if not name.endswith(EXPERT_WEIGHTS):
            return torch.stack(of_rank).sum(0)
        return torch.cat([torch.stack(of_rank[place :: case.ep]).sum(0) for place in range(case.ep)])

    y_BLD, dx_BLD = (case.whole.unshard([getattr(run, field) for run in runs]) for field in ("y_BLD", "dx_BLD"))
    return Run(y_BLD, dx_BLD, {name: whole(name) for name in runs[0].weights})


def off_by(run: Run, reference: Run) -> float:
    """The largest difference, relative to the largest value of a tensor."""
    assert run.weights.keys() == reference.weights.keys()
    pairs = [(run.y_BLD, reference.y_BLD), (run.dx_BLD, reference.dx_BLD)]
    pairs += [(run.weights[name], reference.weights[name]) for name in run.weights]
    return max(float((mine - other).abs().max() / other.abs().max()) for mine, other in pairs)
