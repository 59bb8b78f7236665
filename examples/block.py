"""An MoE layer in a transformer block, on 4 CPU ranks: each holds a piece of the same 2 sequences of 5 tokens."""

import torch
import torch.distributed as dist
from torch import nn

from moe_dispatch import GroupedExperts, MoE, Partition, SwiGLU, TokenSharding, TopKRouter
from moe_dispatch.testing import run_ranks


class Block(nn.Module):
    def __init__(self, dim: int, experts: Partition, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        router, shared = TopKRouter(dim, experts.total, top_k=2, score="sigmoid"), SwiGLU(dim, 2 * dim)
        with torch.random.fork_rng():  # experts are each rank's own; all else starts alike, from one seed
            torch.manual_seed(int(torch.randint(2**62, (), device="cpu")) + group.rank())  # other ones in each layer
            mine = GroupedExperts(experts.sizes[group.rank()], dim, hidden=2 * dim)
        self.moe = MoE(router=router, experts=mine, partition=experts, group=group, shared=shared)

    def forward(self, x_BlD: torch.Tensor, sharding: TokenSharding) -> tuple[torch.Tensor, torch.Tensor]:
        y_BlD, scores_BlE = self.moe(self.norm(x_BlD), sharding=sharding)
        return x_BlD + y_BlD, scores_BlE  # the scores are for sequence_balance_loss


def layer(rank: int) -> str:
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 1, 1)))  # uneven, and rank 1 holds nothing
    block = Block(16, Partition.balanced(6, 4), dist.group.WORLD)  # every rank starts from the same seed
    x_BlD = sharding.shard(torch.randn(2, 5, 16), rank)
    y_BlD, _ = block(x_BlD, sharding)
    return f"rank {rank}: tokens {sharding.tokens(rank).tolist()}, output {tuple(y_BlD.shape)}"


if __name__ == "__main__":
    print("\n".join(run_ranks(layer, 4)))
