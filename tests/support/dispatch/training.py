"""A small model with an MoE layer on 2 x 2 or more ranks and in one process: the same numbers in both."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dispatch import GroupedExperts, MoE, ParallelMesh, Partition, SwiGLU, TokenSharding, TopKRouter, build_mesh
from moe_dispatch.reference import ReferenceMoE
from tests.support.tensors import grad_of

DIM, HIDDEN = 8, 12


class Model(nn.Module):
    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.first, self.moe, self.last = nn.Linear(DIM, DIM), moe, nn.Linear(DIM, DIM)

    def forward(self, x_BlD: Tensor, **options: TokenSharding) -> tuple[Tensor, Tensor]:
        y_BlD, scores_BlE = self.moe(x_BlD + torch.tanh(self.first(x_BlD)), **options)
        return self.last(y_BlD), scores_BlE


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Tokens over all ranks; experts over groups of neighbours, once in each."""

    seq: tuple[int, ...]
    experts: tuple[int, ...]
    seed: int = 0

    @property
    def ranks(self) -> int:
        return len(self.seq)

    @property
    def partition(self) -> Partition:
        return Partition(self.experts)

    @property
    def sharding(self) -> TokenSharding:
        return TokenSharding(batch=2, seq=Partition(self.seq))

    def mesh(self) -> ParallelMesh:
        return build_mesh(sp=self.ranks, ep=len(self.experts), device_type="cpu")

    def whole(self) -> Model:
        """The model of one process, in float64."""
        torch.manual_seed(self.seed)
        router = TopKRouter(DIM, self.partition.total, 2, score="sigmoid")
        experts = GroupedExperts(self.partition.total, DIM, HIDDEN)
        return Model(ReferenceMoE(router=router, experts=experts, shared=SwiGLU(DIM, HIDDEN))).double()

    def part(self, group: dist.ProcessGroup) -> Model:
        """The model of one rank of the experts' ``group``."""
        whole, rank = self.whole(), group.rank()
        mine = self.cut(whole.state_dict(), rank)
        experts = GroupedExperts(self.experts[rank], DIM, HIDDEN)
        router = TopKRouter(DIM, self.partition.total, 2, score="sigmoid")
        moe = MoE(router=router, experts=experts, partition=self.partition, group=group, shared=SwiGLU(DIM, HIDDEN))
        model = Model(moe).double()
        model.load_state_dict(mine)
        return model

    def cut(self, values: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
        """What one rank of the experts' group has of the values of the whole model."""
        first = sum(self.experts[:rank])
        return {
            name: value[first : first + self.experts[rank]] if ".experts." in name else value
            for name, value in values.items()
        }

    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, and what pulls at outputs and scores, of the whole grid."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        widths = (DIM, DIM, self.partition.total)
        x_BLD, pull_BLD, pull_BLE = (
            torch.randn(*self.sharding.global_shape, width, generator=generator, dtype=torch.float64)
            for width in widths
        )
        return x_BLD, pull_BLD, pull_BLE

    def backward_whole(self, model: Model, scale: float = 1.0) -> dict[str, Tensor]:
        """The gradients of one process, by name."""
        x_BLD, pull_BLD, pull_BLE = self.data()
        y_BLD, scores_BLE = model(x_BLD)
        (((y_BLD * pull_BLD).sum() + (scores_BLE * pull_BLE).sum()) * scale).backward()
        return {name: grad_of(weight) for name, weight in model.named_parameters()}

    def backward(self, model: nn.Module, rank: int, ep_ranks: tuple[int, ...], scale: float = 1.0) -> None:
        """Forward and backward of one rank's tokens."""
        x_BlD, pull_BlD, pull_BlE = (self.sharding.shard(whole, rank) for whole in self.data())
        y_BlD, scores_BlE = model(x_BlD, sharding=self.sharding.select(ep_ranks))
        (((y_BlD * pull_BlD).sum() + (scores_BlE * pull_BlE).sum()) * scale).backward()


LAYOUTS = [
    Layout(seq=(3, 0, 2, 1), experts=(3, 2)),  # two copies of the experts, and a rank without tokens
    Layout(seq=(3, 0, 2, 1), experts=(0, 5)),
    Layout(seq=(2, 0, 3), experts=(1, 0, 4)),  # all ranks are one layer's
    Layout(seq=(2, 1, 4), experts=(4,)),  # every rank has all experts
    Layout(seq=(4,), experts=(4,)),
]
