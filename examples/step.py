"""Training steps over a mesh: losses and gradient norms of 4 ranks are those of one."""

import torch
from torch import nn

from moe_dispatch import GroupedExperts, TopKRouter
from moe_dispatch.reference import ReferenceMoE
from moe_dispatch.testing import run_ranks
from sp_attention import Batch, Parallel
from sp_attention.reference import ReferenceAttention


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.qkv, self.head = nn.Embedding(99, 16), nn.Linear(16, 48), nn.Linear(16, 99)
        # Layers of one process, in plain loops. On ranks ``apply`` puts UlyssesAttention and MoE in their places.
        self.attention = ReferenceAttention(is_causal=True)
        self.moe = ReferenceMoE(router=TopKRouter(16, 6, top_k=2, score="softmax"), experts=GroupedExperts(6, 16, 32))

    def forward(self, token_Bl, of_attention, of_moe):
        x_BlD = self.token(token_Bl)
        q, k, v = self.qkv(x_BlD).unflatten(-1, (3, 4, 4)).unbind(2)
        x_BlD = x_BlD + self.attention(q, k, v, **of_attention).flatten(2)
        return self.head(x_BlD + self.moe(x_BlD, **of_moe)[0])


def train(rank: int, dp: int, sp: int, ep: int) -> str:
    model = Model()  # the same on every rank
    batch = Batch(token_BL=torch.randint(99, (3, 9)))  # and the batch

    parallel = Parallel(dp=dp, sp=sp, ep=ep, device_type="cpu")
    parallel.apply(model)  # each rank keeps its experts
    # For FSDP2: parallel.fully_shard(layer) for each layer, then parallel.fully_shard(model).
    optimizer, told = torch.optim.AdamW(model.parameters(), lr=0.01), f"rank {rank} of {dp * sp}:"
    for _ in range(3):
        optimizer.zero_grad()
        part = parallel.shard(batch)  # rows over "dp", places over "sp"
        logits_BlV = model(part.batch.token_Bl, part.attention, part.moe)
        loss = parallel.loss(logits_BlV, part)  # over the targets of all ranks
        loss.share.backward()
        parallel.sum_gradients(model)  # of what FSDP2 does not sum
        norm = parallel.clip_grad_norm(model, 1.0)
        optimizer.step()
        told += f"  loss {loss.whole:.4f}, norm {norm:.4f}"
    return told


if __name__ == "__main__":
    print("\n".join(run_ranks(train, 1, 1, 1, 1) + run_ranks(train, 4, 2, 2, 4)))
