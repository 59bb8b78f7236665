"""A model of one's own: a transformer with MoE and Ulysses attention, under FSDP2, expert and sequence parallelism.

``python -m moe_dispatch validate --subject examples/subject.py:MySubject`` compares it with one process.
"""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from moe_dispatch import GroupedExperts, MoE, Partition, TokenSharding, TopKRouter, share_of_state_dict
from moe_dispatch.reference import ReferenceMoE
from moe_dispatch.testing import Outcome
from sp_attention import Batch, UlyssesAttention, mean_cross_entropy, shard_batch
from sp_attention.reference import reference_attention

D, F_, E = 32, 48, 8


def router():
    return TopKRouter(D, E, top_k=2, score="sigmoid")


class Model(nn.Module):
    def __init__(self, attention, moe):
        super().__init__()
        self.token, self.position = nn.Embedding(256, D), nn.Embedding(64, D)
        self.qkv, self.out, self.head = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, 256)
        self.attention, self.moe = attention, moe

    def forward(self, token_Bl, position_Bl, of_attention, of_moe):
        x_BlD = self.token(token_Bl) + self.position(position_Bl)
        q, k, v = self.qkv(x_BlD).unflatten(-1, (3, 4, D // 4)).unbind(2)
        x_BlD = x_BlD + self.out(self.attention(q, k, v, **of_attention).flatten(2))
        return self.head(x_BlD + self.moe(x_BlD, **of_moe)[0])


class MySubject:
    def whole(self, layout):
        torch.manual_seed(0)
        moe = ReferenceMoE(router=router(), experts=GroupedExperts(E, D, F_))
        return Model(partial(reference_attention, is_causal=True), moe)

    def share(self, whole, layout, mesh):
        sp, ep, all_ranks = mesh.dense.get_group("sp"), mesh.expert.get_group("ep"), (dist.get_world_size(),)
        parts = Partition.balanced(E, ep.size())
        mine = GroupedExperts(parts.sizes[ep.rank()], D, F_)
        moe = MoE(router=router(), experts=mine, partition=parts, group=ep)
        model = Model(UlyssesAttention(group=sp, is_causal=True), moe).to(whole.head.weight.dtype)
        model.load_state_dict(share_of_state_dict(whole.state_dict(), model))
        fully_shard(mine, mesh=mesh.expert["edp"])
        fully_shard(model, mesh=init_device_mesh(mesh.dense.device_type, all_ranks))
        for module in filter(lambda module: isinstance(module, FSDPModule), model.modules()):
            module.set_gradient_divide_factor(1.0)  # each rank's loss is a share: gradients are summed
            module.set_force_sum_reduction_for_comms(True)
        return model

    def step_whole(self, model, token_BL, layout):
        logits_BLV = model(token_BL, torch.arange(layout.seq).expand(layout.shape), {}, {})
        loss = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), token_BL[:, 1:].flatten())
        loss.backward()
        return Outcome(logits_BlV=logits_BLV, loss=loss, tokens=TokenSharding(batch=layout.batch, seq=layout.seq))

    def step_share(self, model, token_BL, layout, mesh):
        rows, places = Partition.balanced(layout.batch, layout.dp), Partition.balanced(layout.seq, layout.sp)
        token_bL = token_BL.split(rows.sizes)[mesh.dense["dp"].get_local_rank()]
        mine, tokens = TokenSharding(batch=len(token_bL), seq=places), TokenSharding(batch=rows, seq=places)
        batch = shard_batch(Batch(token_BL=token_bL), sharding=mine, group=mesh.dense.get_group("sp"))
        of_moe = {"sharding": tokens.select(mesh.ep_ranks)}
        logits_blV = model(batch.token_Bl, batch.position_Bl, batch.attention, of_moe)
        loss = mean_cross_entropy(logits_blV, batch.target_Bl, group=dist.group.WORLD).share
        loss.backward()
        return Outcome(logits_BlV=logits_blV, loss=loss, tokens=tokens)

    def whole_gradient(self, name, gradient, layout, mesh):
        if "experts" not in name:
            return gradient
        parts = [gradient] * layout.ep
        dist.all_gather_object(parts, gradient, group=mesh.expert.get_group("ep"))
        return torch.cat(parts)
