"""A small subject without a wrapper, and the mistakes that people make with one."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from moe_dispatch import (
    GroupedExperts,
    MoE,
    ParallelMesh,
    Partition,
    TokenSharding,
    TopKRouter,
    share_of_state_dict,
    sum_gradients,
)
from moe_dispatch.reference import ReferenceMoE
from moe_dispatch.testing import Layout, Outcome
from sp_attention import Batch, mean_cross_entropy, shard_batch, ulysses_attention
from sp_attention.reference import reference_attention
from tests.support.ranks import world

DIM, EXPERTS = 8, 4


class Model(nn.Module):
    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, DIM), nn.Embedding(64, DIM)
        self.qkv, self.head, self.moe = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, 256), moe

    def forward(self, token_Bl: Tensor, position_Bl: Tensor, attend, **of_moe) -> Tensor:
        x_BlD = self.token(token_Bl) + self.position(position_Bl)
        q, k, v = self.qkv(x_BlD).unflatten(-1, (3, 2, DIM // 2)).unbind(2)
        x_BlD = x_BlD + attend(q, k, v, is_causal=True).flatten(2)
        return self.head(x_BlD + self.moe(x_BlD, **of_moe)[0])


def router() -> TopKRouter:
    return TopKRouter(DIM, EXPERTS, top_k=2, score="sigmoid")


@dataclass(frozen=True)
class Small:
    """``mistake`` names what is wrong; empty for nothing."""

    mistake: str = ""
    order: str = "BL"
    is_wrapped: bool = False

    def whole(self, layout: Layout) -> Model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Model(ReferenceMoE(router=router(), experts=GroupedExperts(EXPERTS, DIM, DIM)))

    def share(self, whole: nn.Module, layout: Layout, mesh: ParallelMesh) -> Model:
        ep = mesh.expert.get_group("ep")
        parts = Partition.balanced(EXPERTS, ep.size())
        experts = GroupedExperts(parts.sizes[ep.rank()], DIM, DIM)
        model = Model(MoE(router=router(), experts=experts, partition=parts, group=ep))
        model = model.to(next(whole.parameters()).dtype)
        model.load_state_dict(share_of_state_dict(whole.state_dict(), model))
        if self.mistake == "another parameter" and dist.get_rank() == 2:
            model.register_parameter("extra", nn.Parameter(torch.zeros(1)))
        if self.is_wrapped:
            model.moe = checkpoint_wrapper(model.moe)
        return model

    def step_whole(self, model: nn.Module, token_BL: Tensor, layout: Layout) -> Outcome:
        logits_BLV = model(token_BL, torch.arange(layout.seq).expand(layout.shape), reference_attention)
        loss = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), token_BL[:, 1:].flatten())
        loss.backward()
        return Outcome(logits_BlV=logits_BLV, loss=loss, tokens=TokenSharding(batch=layout.batch, seq=layout.seq))

    def step_share(self, model: nn.Module, token_BL: Tensor, layout: Layout, mesh: ParallelMesh) -> Outcome:
        rows, whole_rows = Partition.balanced(layout.batch, layout.dp), layout.sharding
        token_bL = token_BL.split(rows.sizes)[mesh.dense["dp"].get_local_rank()]
        sp = mesh.dense.get_group("sp")
        batch = shard_batch(Batch(token_BL=token_bL), sharding=whole_rows.with_batch(len(token_bL)), group=sp)
        tokens = whole_rows.with_batch(rows)
        position_bl = batch.position_Bl
        if self.mistake == "positions from zero" and position_bl.numel():
            position_bl = position_bl - position_bl.min()
        if self.mistake == "positions of contiguous shards":
            lengths = whole_rows.places.lengths
            position_bl = torch.arange(layout.seq).split(lengths.sizes)[sp.rank()].expand(position_bl.shape)
        attend = partial(ulysses_attention, group=sp, **batch.attention)
        logits_blV = model(batch.token_Bl, position_bl, attend, sharding=tokens.select(mesh.ep_ranks))
        loss = mean_cross_entropy(logits_blV, batch.target_Bl, group=world())
        share = loss.whole + loss.share - loss.share.detach() if self.mistake == "whole loss" else loss.share
        share.backward()
        self._sum(model, mesh)
        if self.order == "LB":
            logits_blV, tokens = (
                logits_blV.transpose(0, 1),
                TokenSharding(batch=rows, seq=tokens.seq, order="LB", held=tokens.held),
            )
        return Outcome(logits_BlV=logits_blV, loss=share, tokens=tokens)

    def _sum(self, model: nn.Module, mesh: ParallelMesh) -> None:
        sum_gradients(model, group=world(), expert_group=mesh.expert.get_group("edp"))
        experts = [parameter for name, parameter in model.named_parameters() if "experts" in name]
        if self.mistake == "averaged":
            of_experts = {id(parameter) for parameter in experts}
            for parameter in model.parameters():
                if id(parameter) not in of_experts and parameter.grad is not None:
                    parameter.grad /= dist.get_world_size()
        if self.mistake == "experts too often":
            for parameter in experts:
                dist.all_reduce(parameter.grad, group=mesh.expert.get_group("edp"))
        if self.mistake == "router cut off":
            model.get_parameter("moe.router.weight_ED").grad = None

    def whole_gradient(self, name: str, gradient: Tensor, layout: Layout, mesh: ParallelMesh) -> Tensor:
        if "experts" not in name:
            return gradient
        parts: list[Tensor] = [gradient] * layout.ep
        dist.all_gather_object(parts, gradient, group=mesh.expert.get_group("ep"))
        return torch.cat(parts)
