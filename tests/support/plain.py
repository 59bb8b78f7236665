"""A transformer of anybody's, written for one process with the reference layers."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dispatch import GroupedExperts, SwiGLU, TopKRouter
from moe_dispatch.reference import ReferenceMoE
from sp_attention.reference import ReferenceAttention

DIM, HEADS, KV_HEADS, EXPERTS, VOCABULARY = 8, 4, 2, 5, 13


class Block(nn.Module):
    def __init__(self, window: tuple[int, int] | None) -> None:
        super().__init__()
        self.heads = (HEADS, KV_HEADS, KV_HEADS)
        self.qkv, self.out = nn.Linear(DIM, DIM // HEADS * sum(self.heads)), nn.Linear(DIM, DIM)
        self.attention = ReferenceAttention(is_causal=True, window=window, scale=0.9)
        self.moe = ReferenceMoE(
            router=TopKRouter(DIM, EXPERTS, top_k=2, score="sigmoid"),
            experts=GroupedExperts(EXPERTS, DIM, 12),
            shared=SwiGLU(DIM, 12),
        )

    def forward(self, x_BlD: Tensor, of_attention: Mapping[str, Any], of_moe: Mapping[str, Any]) -> Tensor:
        q, k, v = self.qkv(x_BlD).unflatten(-1, (sum(self.heads), -1)).split(self.heads, dim=2)
        x_BlD = x_BlD + self.out(self.attention(q, k, v, **of_attention).flatten(2))
        return x_BlD + self.moe(x_BlD, **of_moe)[0]


class Plain(nn.Module):
    """(b, l) tokens and positions -> (b, l, V). Embedding and head are one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, DIM), nn.Embedding(32, DIM)
        self.blocks = nn.ModuleList([Block(None), Block((3, 0))])
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)
        self.head.weight = self.token.weight

    def forward(
        self, token_Bl: Tensor, position_Bl: Tensor, of_attention: Mapping[str, Any], of_moe: Mapping[str, Any]
    ) -> Tensor:
        x_BlD = self.token(token_Bl) + self.position(position_Bl)
        for block in self.blocks:
            x_BlD = block(x_BlD, of_attention, of_moe)
        return self.head(x_BlD)


def blocks_of(model: Plain) -> list[Any]:
    """Any, for what ``Parallel.apply`` puts in their places."""
    return list(model.blocks)


def new_model(dtype: torch.dtype = torch.float64) -> Plain:
    """The same everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Plain().to(dtype)


def mean_loss(logits_BLV: Tensor, target_BL: Tensor) -> Tensor:
    """Of one process."""
    return F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten(), ignore_index=-100)
