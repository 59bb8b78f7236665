"""A small DeepSeek-style model: multi-head latent attention, a few dense layers, then MoE layers with shared experts.

Sources: DeepSeek-V2 (arXiv:2405.04434) for the attention, DeepSeek-V3 (arXiv:2412.19437) for the routing. One
definition serves one process and every mesh: what differs is the layout that moves tokens, the modules that were
parallelised, and the MoE layer.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from .... import SwiGLU, TopKRouter
from ..config.tables import ModelConfig
from .layout import Layout

# (router, shared experts) -> MoE layer
MakeMoE = Callable[[TopKRouter, nn.Module | None], nn.Module]


def rotate(x_blNH: Tensor, position_t: Tensor, theta: float) -> Tensor:
    """Rotary embedding (arXiv:2104.09864) of neighbouring pairs of the last dimension, by each token's position."""
    half = x_blNH.shape[-1] // 2
    dtype = torch.promote_types(x_blNH.dtype, torch.float32)
    frequency_h = theta ** (-torch.arange(half, dtype=dtype, device=x_blNH.device) / half)
    angle_blh = torch.outer(position_t.to(dtype), frequency_h).view(*x_blNH.shape[:2], 1, half)
    even, odd = x_blNH.to(dtype).unflatten(-1, (half, 2)).unbind(-1)
    cos, sin = angle_blh.cos(), angle_blh.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_blNH.dtype)


class LatentAttention(nn.Module):
    """Multi-head latent attention: queries, keys and values come from narrow latents, and the query/key width differs
    from the value width.

    The latents are made where a token lives and are what enters the tensor-parallel region; the heads are made
    inside.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.nope_head_dim + config.rope_head_dim
        query_rank = config.q_lora_rank or config.dim
        self.query_latent = nn.Linear(config.dim, query_rank, bias=False) if config.q_lora_rank else nn.Identity()
        self.query_norm = nn.RMSNorm(query_rank, eps=config.norm_eps) if config.q_lora_rank else nn.Identity()
        self.key_latent = nn.Linear(config.dim, config.kv_lora_rank + config.rope_head_dim, bias=False)
        self.key_norm = nn.RMSNorm(config.kv_lora_rank, eps=config.norm_eps)
        self.query = nn.Linear(query_rank, config.heads * width, bias=False)
        self.key_value = nn.Linear(
            config.kv_lora_rank, config.heads * (config.nope_head_dim + config.value_head_dim), bias=False
        )
        self.out = nn.Linear(config.heads * config.value_head_dim, config.dim, bias=False)

    def forward(self, x_blD: Tensor, layout: Layout) -> Tensor:
        """(b, l, D) -> (b, l, D)."""
        config = self.config
        query_latent_blR = self.query_norm(self.query_latent(x_blD))
        key_latent_blR, key_rope_blH = self.key_latent(x_blD).split(
            [config.kv_lora_rank, config.rope_head_dim], dim=-1
        )
        key_rope_blH = rotate(key_rope_blH.unsqueeze(2), layout.positions(), config.rope_theta).squeeze(2)
        widths = [query_latent_blR.shape[-1], config.kv_lora_rank, config.rope_head_dim]
        latent_uR = layout.enter(torch.cat([query_latent_blR, self.key_norm(key_latent_blR), key_rope_blH], dim=-1))
        query_latent_uR, key_latent_uR, key_rope_uH = latent_uR.split(widths, dim=-1)
        query_uC, key_value_uC = self.query(query_latent_uR), self.key_value(key_latent_uR)
        return layout.leave(self.out(self._attend(query_uC, key_value_uC, layout.local(key_rope_uH), layout)))

    def _attend(self, query_uC: Tensor, key_value_uC: Tensor, key_rope_uH: Tensor, layout: Layout) -> Tensor:
        """Causal attention of this rank's heads for the tokens of the region."""
        config, (b, m) = self.config, layout.region_shape
        query_width = config.nope_head_dim + config.rope_head_dim
        q_bmnH = rearrange(query_uC, "(b m) (n h) -> b m n h", b=b, m=m, h=query_width)
        q_nope_bmnH, q_rope_bmnH = q_bmnH.split([config.nope_head_dim, config.rope_head_dim], dim=-1)
        q_rope_bmnH = rotate(q_rope_bmnH, layout.region_positions(), config.rope_theta)
        key_value_width = config.nope_head_dim + config.value_head_dim
        key_value_bmnH = rearrange(key_value_uC, "(b m) (n h) -> b m n h", b=b, m=m, h=key_value_width)
        k_nope_bmnH, v_bmnH = key_value_bmnH.split([config.nope_head_dim, config.value_head_dim], dim=-1)
        heads = k_nope_bmnH.shape[2]
        k_rope_bmnH = key_rope_uH.view(b, m, 1, config.rope_head_dim).expand(-1, -1, heads, -1)
        out_bmnH = layout.attend(
            torch.cat([q_nope_bmnH, q_rope_bmnH], dim=-1), torch.cat([k_nope_bmnH, k_rope_bmnH], dim=-1), v_bmnH
        )
        return rearrange(out_bmnH, "b m n h -> (b m) (n h)")


class DenseFeedForward(nn.Module):
    """The feed-forward layer of the first blocks, its hidden units split over "tp"."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = SwiGLU(config.dim, config.dense_hidden)

    def forward(self, x_blD: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor]]:
        """(b, l, D) -> (b, l, D), and no scores."""
        return layout.leave(self.dense(layout.enter(x_blD))), []


class SparseFeedForward(nn.Module):
    """The MoE layer of the other blocks, on each rank's own tokens."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x_blD: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor]]:
        """(b, l, D) -> (b, l, D), and the router's scores (b, l, E)."""
        y_blD, scores_blE = layout.run_moe(self.moe, x_blD)
        return y_blD, [scores_blE]


class Block(nn.Module):
    """Attention, then a dense or a sparse feed-forward layer, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = LatentAttention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = feed_forward

    def forward(self, x_blD: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor]]:
        """(b, l, D) -> (b, l, D), and the scores of a sparse layer."""
        x_blD = x_blD + self.attention(self.attention_norm(x_blD), layout)
        y_blD, scores = self.feed_forward(self.feed_forward_norm(x_blD), layout)
        return x_blD + y_blD, scores


class DebugModel(nn.Module):
    """The model.

    Args:
        config: its dimensions.
        make_moe: makes the MoE layer from its router and shared experts.
    """

    def __init__(self, config: ModelConfig, make_moe: MakeMoE) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(
            Block(
                config,
                DenseFeedForward(config)
                if layer < config.dense_layers
                else SparseFeedForward(make_moe(make_router(config), make_shared(config))),
            )
            for layer in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)

    def forward(self, token_bl: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor]]:
        """(b, l) tokens -> (b, l, V) logits, and the scores (b, l, E) of each MoE layer."""
        x_blD = self.embedding(token_bl)
        scores = []
        for block in self.blocks:
            x_blD, block_scores = block(x_blD, layout)
            scores += block_scores
        return layout.mine(self.head(layout.spread(self.norm(x_blD)))), scores


def make_router(config: ModelConfig) -> TopKRouter:
    """The router of one MoE layer: groups are judged by their best expert for softmax scores, by their two best for
    sigmoid."""
    return TopKRouter(
        config.dim,
        config.experts,
        config.top_k,
        score=config.score,
        groups=config.groups,
        limited_groups=config.limited_groups,
        judged_by=min(1 if config.score == "softmax" else 2, config.experts // config.groups),
        normalize=config.normalize,
        route_scale=config.route_scale,
    )


def make_shared(config: ModelConfig) -> nn.Module | None:
    """The shared experts of one MoE layer, as one wide expert."""
    if not config.shared_experts:
        return None
    return SwiGLU(config.dim, config.shared_experts * config.expert_hidden)
