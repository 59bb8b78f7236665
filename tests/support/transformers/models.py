"""Tiny models of Transformers, with weights so wide that every signal is of order one."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DEEPSEEK: dict[str, Any] = {
    **COMMON,
    "num_hidden_layers": 3,
    "num_key_value_heads": 8,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    # Its factor is in the scale of attention, too, which is then no H ** -0.5.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
QWEN3: dict[str, Any] = {
    **COMMON,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "qwen3_moe": ("qwen3_moe", QWEN3),
    "qwen3_tied_aux": (
        "qwen3_moe",
        {**QWEN3, "tie_word_embeddings": True, "output_router_logits": True, "router_aux_loss_coef": 0.1},
    ),
    "mixtral": (
        "mixtral",
        {**COMMON, "intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **COMMON,
            "head_dim": 8,
            "intermediate_size": 24,
            "num_local_experts": 8,
            "num_experts_per_tok": 4,
            "sliding_window": 7,
        },
    ),
}
FAMILIES = ("deepseek_v3", "qwen3_moe", "mixtral", "gpt_oss")


def new_model(name: str, dtype: torch.dtype) -> Any:
    """The model of one process, by Transformers' own eager code; the same weights in every call."""
    kind, settings = CONFIGS[name]
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    widen(model)
    return model.to(dtype)


@torch.no_grad()
def widen(model: Any) -> None:
    """Transformers draws with 0.02, in which routers, sinks and biases hardly matter."""
    generator = torch.Generator().manual_seed(7)
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "correction" in n)]
    for name, x in tensors:
        drawn = torch.randn(x.shape, generator=generator)
        if "norm" in name:
            x.copy_(1 + 0.2 * drawn)
        elif x.ndim < 2 or name.endswith("_bias"):
            x.copy_(0.3 * drawn)
        elif "embed" in name:
            x.copy_(drawn)
        else:
            fan_in = (
                x.shape[-2]
                if "gpt_oss" in type(model).__module__ and "_proj" in name and x.ndim == 3
                else x.shape[-1]
            )
            x.copy_(1.5 * fan_in**-0.5 * drawn)
