"""A model of one's own: a transformer with MoE and Ulysses attention, under FSDP2, expert and sequence parallelism.

``python -m moe_dispatch validate --subject examples/subject.py:MySubject`` compares it with one process.
"""

from copy import deepcopy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from moe_dispatch import GroupedExperts, TokenSharding, TopKRouter
from moe_dispatch.reference import ReferenceMoE
from moe_dispatch.testing import Outcome
from sp_attention import Batch, Parallel
from sp_attention.reference import ReferenceAttention

D, F_, E = 32, 48, 8


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(256, D), nn.Embedding(64, D)
        self.qkv, self.out, self.head = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, 256)
        self.attention = ReferenceAttention(is_causal=True)
        self.moe = ReferenceMoE(router=TopKRouter(D, E, top_k=2, score="sigmoid"), experts=GroupedExperts(E, D, F_))

    def forward(self, token_Bl, position_Bl, of_attention, of_moe):
        x_BlD = self.token(token_Bl) + self.position(position_Bl)
        q, k, v = self.qkv(x_BlD).unflatten(-1, (3, 4, D // 4)).unbind(2)
        x_BlD = x_BlD + self.out(self.attention(q, k, v, **of_attention).flatten(2))
        return self.head(x_BlD + self.moe(x_BlD, **of_moe)[0])


class MySubject:
    def whole(self, layout):
        torch.manual_seed(0)
        return Model()

    def share(self, whole, layout, mesh):
        model = deepcopy(whole)
        Parallel.on(mesh).apply(model)  # each rank keeps its experts; attention goes over "sp"
        Parallel.on(mesh).fully_shard(model)
        return model

    def step_whole(self, model, token_BL, layout):
        logits_BLV = model(token_BL, torch.arange(layout.seq).expand(layout.shape), {}, {})
        loss = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), token_BL[:, 1:].flatten())
        loss.backward()
        return Outcome(logits_BlV=logits_BLV, loss=loss, tokens=TokenSharding(batch=layout.batch, seq=layout.seq))

    def step_share(self, model, token_BL, layout, mesh):
        part = Parallel.on(mesh).shard(Batch(token_BL=token_BL), sharding=layout.sharding)
        logits_BlV = model(part.batch.token_Bl, part.batch.position_Bl, part.attention, part.moe)
        loss = Parallel.on(mesh).loss(logits_BlV, part).share
        loss.backward()
        return Outcome(logits_BlV=logits_BlV, loss=loss, tokens=part.sharding)

    def whole_gradient(self, name, gradient, layout, mesh):
        if "experts" not in name:
            return gradient
        parts = [gradient] * layout.ep
        dist.all_gather_object(parts, gradient, group=mesh.expert.get_group("ep"))
        return torch.cat(parts)
