"""Training steps, written out: losses and gradient norms on 2 ranks are those of one rank."""

import torch
import torch.distributed as dist
from torch import nn

from block import Block
from moe_dispatch import Partition, TokenSharding, clip_grad_norm, sequence_balance_loss, sum_gradients
from moe_dispatch.testing import run_ranks
from sp_attention import Batch, ShardedBatch, UlyssesAttention, mean_cross_entropy, shard_batch


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.heads = (heads, kv_heads, kv_heads)
        self.qkv = nn.Linear(dim, dim // heads * sum(self.heads), bias=False)
        self.attention = UlyssesAttention(group=group, is_causal=True)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BlD: torch.Tensor, *, sharding: TokenSharding, **options: torch.Tensor) -> torch.Tensor:
        q_BlNH, k_BlGH, v_BlGH = self.qkv(x_BlD).unflatten(-1, (sum(self.heads), -1)).split(self.heads, dim=2)
        out_BlNH = self.attention(q_BlNH, k_BlGH, v_BlGH, sharding=sharding, **options)
        return self.out(out_BlNH.flatten(2))


class Model(nn.Module):
    def __init__(self, vocabulary: int, dim: int, experts: Partition, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, dim), nn.Embedding(64, dim)
        self.attention, self.block = SelfAttention(dim, 4, 2, group), Block(dim, experts, group)
        self.head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, batch: ShardedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        x_BlD = self.embed(batch.token_Bl) + self.place(batch.position_Bl)
        x_BlD = x_BlD + self.attention(x_BlD, **batch.attention)  # the sharding, and masks if there are any
        x_BlD, scores_BlE = self.block(x_BlD, batch.sharding)
        return self.head(x_BlD), scores_BlE


def train(rank: int, steps: int) -> str:
    group = dist.group.WORLD
    experts = Partition.balanced(6, group.size())
    sharding = TokenSharding(batch=2, seq=Partition.balanced(9, group.size()))
    batch = Batch(token_BL=torch.randint(100, (2, 9)))  # the same on every rank
    batch = shard_batch(batch, sharding=sharding, group=group)  # this rank's part of it
    model = Model(100, 16, experts, group).double()
    for expert in range(experts.sizes[rank]):  # each from a seed of its own: alike on any number of ranks
        torch.manual_seed(experts.offsets[rank] + expert)
        for weight in model.block.moe.experts.parameters():
            nn.init.normal_(weight.data[expert], std=0.25)
    optimizer, told = torch.optim.AdamW(model.parameters(), lr=0.01), f"rank {rank} of {group.size()}:"
    for _ in range(steps):
        optimizer.zero_grad()
        logits_BlV, scores_BlE = model(batch)
        loss = mean_cross_entropy(logits_BlV, batch.target_Bl, group=group)  # over the targets of all ranks
        balance = sequence_balance_loss(scores_BlE, top_k=2, sharding=sharding, group=group)
        (loss.share + 0.001 * balance).backward()  # both are shares of this rank, so gradients are summed
        sum_gradients(model, group=group)  # but of experts: the rows of all ranks came to them
        norm = clip_grad_norm(model, 1.0)  # that of the whole model, with the experts of all ranks
        optimizer.step()
        model.block.moe.update_bias(0.001, group)  # by the loads of all ranks since the last call
        told += f"  loss {loss.whole:.6f}, norm {norm:.6f}"
    return told


if __name__ == "__main__":
    print("\n".join(run_ranks(train, 1, 3) + run_ranks(train, 2, 3)))
