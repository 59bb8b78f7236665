"""A small DeepSeek-style model: multi-head latent attention, a few dense layers, then MoE layers with shared experts.

Sources: DeepSeek-V2 (arXiv:2405.04434) for the attention, DeepSeek-V3 (arXiv:2412.19437) for the routing. One
definition serves one process and every mesh: what differs is the layout that moves tokens, the modules that were
parallelised, and the MoE layer.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
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


class KeyValue(nn.Linear):
    """Keys without their rotary part, and values, of the latents: whole, or where the weight is used otherwise."""

    def with_weight(self, run: Callable[[Tensor], Tensor]) -> Tensor:
        """``run`` on the weight: FSDP2 has it whole only within a call of this module."""
        return run(self.weight)


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
        self.key_value = KeyValue(
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
        widths = [config.kv_lora_rank, config.rope_head_dim]
        entered_uR = layout.enter(torch.cat([query_latent_blR, self.key_norm(key_latent_blR), key_rope_blH], dim=-1))
        query_latent_uR, latent_uR = entered_uR.split([query_latent_blR.shape[-1], sum(widths)], dim=-1)
        q_bmnH = self._queries(self.query(query_latent_uR), layout)
        if layout.attention.sends_latents:
            latent_bmR = layout.local(latent_uR).unflatten(0, layout.region_shape)
            attend = partial(layout.attention.attend_to_latents, q_bmnH, latent_bmR, self._expand)
            out_bmnH = self.key_value.with_weight(attend)
        else:
            key_latent_uR, key_rope_uH = latent_uR.split(widths, dim=-1)
            rope_bmH = layout.local(key_rope_uH).unflatten(0, layout.region_shape)
            key_value_bmC = self.key_value(key_latent_uR).unflatten(0, layout.region_shape)
            out_bmnH = layout.attention.attend(q_bmnH, *self._keys_and_values(key_value_bmC, rope_bmH))
        return layout.leave(self.out(rearrange(out_bmnH, "b m n h -> (b m) (n h)")))

    def _queries(self, query_uC: Tensor, layout: Layout) -> Tensor:
        """(b, m, n, H) of this rank's heads, for the tokens of the region."""
        config, (b, m) = self.config, layout.region_shape
        query_width = config.nope_head_dim + config.rope_head_dim
        q_bmnH = rearrange(query_uC, "(b m) (n h) -> b m n h", b=b, m=m, h=query_width)
        q_nope_bmnH, q_rope_bmnH = q_bmnH.split([config.nope_head_dim, config.rope_head_dim], dim=-1)
        q_rope_bmnH = rotate(q_rope_bmnH, layout.region_positions(), config.rope_theta)
        return torch.cat([q_nope_bmnH, q_rope_bmnH], dim=-1)

    def _keys_and_values(self, key_value_bmC: Tensor, rope_bmH: Tensor) -> tuple[Tensor, Tensor]:
        """(b, m, g, H) and (b, m, g, Hv) of some heads, which have the rotated part in common."""
        nope, value = self.config.nope_head_dim, self.config.value_head_dim
        key_value_bmgH = rearrange(key_value_bmC, "b m (g h) -> b m g h", h=nope + value)
        k_nope_bmgH, v_bmgH = key_value_bmgH.split([nope, value], dim=-1)
        k_rope_bmgH = rope_bmH.unsqueeze(2).expand(-1, -1, k_nope_bmgH.shape[2], -1)
        return torch.cat([k_nope_bmgH, k_rope_bmgH], dim=-1), v_bmgH

    def _expand(self, latent_BLR: Tensor, weight_XR: Tensor, *, heads: range) -> tuple[Tensor, Tensor]:
        """Keys and values of some of the heads that a weight has, of latents with the rotated part after them."""
        config = self.config
        wide_BLR, rope_BLH = latent_BLR.split([config.kv_lora_rank, config.rope_head_dim], dim=-1)
        rows = config.nope_head_dim + config.value_head_dim
        weight_xR = weight_XR[heads.start * rows : heads.stop * rows]
        return self._keys_and_values(F.linear(wide_BLR, weight_xR), rope_BLH)


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
