"""Shrunk configs keep their structure."""

from typing import Any

import pytest
from transformers import AutoConfig

from sp_attention.integrations.transformers.judged.shrunk import shrunk


def both(kind: str, **settings: Any) -> tuple[Any, Any]:
    config = AutoConfig.for_model(kind, **settings)
    return config, shrunk(config)


@pytest.mark.parametrize(
    ("kind", "heads", "experts", "layers"),
    [
        ("deepseek_v3", (8, 8), (32, 4, 4, 2), 2),
        ("qwen3_moe", (8, 1), (32, 4, 1, 1), 2),
        ("mixtral", (8, 2), (8, 2, 1, 1), 2),
        ("gpt_oss", (8, 1), (32, 4, 1, 1), 2),
        ("glm4_moe", (12, 1), (32, 4, 1, 1), 2),
        ("qwen2_moe", (8, 8), (32, 4, 1, 1), 2),
        ("mimo_v2_flash", (16, 1), (32, 4, 1, 1), 3),
        ("hunyuan_v1_moe", (8, 8), (1, 1, 1, 1), 2),
    ],
)
def test_ratios_of_heads_and_experts(
    kind: str, heads: tuple[int, int], experts: tuple[int, int, int, int], layers: int
) -> None:
    config, small = both(kind)
    assert (small.num_attention_heads, small.num_key_value_heads) == heads
    assert config.num_attention_heads * heads[1] == config.num_key_value_heads * heads[0]
    text = small.to_dict()
    total = next(text[name] for name in ("n_routed_experts", "num_experts", "num_local_experts") if name in text)
    chosen = text.get("num_experts_per_tok") or text["moe_topk"]
    assert (total, chosen, text.get("n_group") or 1, text.get("topk_group") or 1) == experts
    assert small.num_hidden_layers == layers
    assert small.vocab_size == 256


def test_widths_of_heads_keep_their_ratios() -> None:
    config, small = both("deepseek_v3")
    names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "qk_head_dim")
    assert [getattr(small, name) for name in names] == [16, 8, 16, 24]
    assert [getattr(config, name) for name in names] == [128, 64, 128, 192]
    assert (small.q_lora_rank, small.kv_lora_rank) == (48, 16)
    _, narrow_values = both("mimo_v2_flash")
    assert (narrow_values.head_dim, narrow_values.v_head_dim) == (12, 8)  # of 192 and 128


def test_layers_of_each_kind_are_kept_in_their_order() -> None:
    _, dense_first = both("deepseek_v3")
    assert (dense_first.first_k_dense_replace, dense_first.num_hidden_layers) == (1, 2)
    _, windows = both("gpt_oss")
    assert (windows.layer_types, windows.sliding_window) == (["sliding_attention", "full_attention"], 7)
    _, all_kinds = both("mimo_v2_flash")
    kinds = list(zip(all_kinds.layer_types, all_kinds.mlp_layer_types, strict=True))
    assert kinds == [("full_attention", "dense"), ("sliding_attention", "sparse"), ("full_attention", "sparse")]
    _, ends = both("ernie4_5_moe")
    assert (ends.moe_layer_start_index, ends.moe_layer_end_index, ends.num_hidden_layers) == (1, 1, 2)
    _, listed = both("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[1, 3])
    assert (listed.num_hidden_layers, listed.mlp_only_layers) == (2, [1])  # MoE first


def test_what_is_no_size_stays() -> None:
    settings: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale_all_dim": 1.0}
    settings["original_max_position_embeddings"] = 4096
    config, small = both("deepseek_v3", rope_parameters=settings, max_position_embeddings=16384)
    assert small.rope_parameters == config.rope_parameters
    assert (small.routed_scaling_factor, small.norm_topk_prob) == (2.5, True)
    _, balanced = both("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.1, tie_word_embeddings=True)
    assert (balanced.output_router_logits, balanced.router_aux_loss_coef, balanced.tie_word_embeddings) == (
        True,
        0.1,
        True,
    )


def test_a_small_config_keeps_its_small_sizes() -> None:
    config, small = both(
        "mixtral", num_attention_heads=4, num_key_value_heads=2, num_local_experts=6, num_hidden_layers=1
    )
    assert (small.num_attention_heads, small.num_key_value_heads, small.num_local_experts) == (4, 2, 6)
    assert (small.num_hidden_layers, config.num_hidden_layers) == (1, 1)
