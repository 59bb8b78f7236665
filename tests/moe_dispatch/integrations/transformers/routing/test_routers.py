"""The routers of every model type that the installed Transformers has: which of them replay a record, and how their
weights are made, by a formula that is written by hand and tried on what the router chooses by itself."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from moe_dispatch import RoutingRecord
from moe_dispatch.integrations.transformers import record_routing, replay_routing
from moe_dispatch.integrations.transformers.layout import is_experts
from tests.support.ranks import refusal
from tests.support.transformers.blocks import FORMULAS, WIDTH, modules_of_blocks, new_block

pytestmark = pytest.mark.usefixtures("uncovered")

OF_FORMULA = {
    "softmax": (
        "DeepseekOcr2TextMoe", "DeepseekV2Moe", "FlexOlmoSparseMoeBlock", "JambaSparseMoeBlock",
        "OlmoeSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock", "UnlimitedOcrTextMoe",
    ),
    "softmax of K": (
        "AriaTextMoELayer", "Cohere2MoeSparseMoeBlock", "Ernie4_5_MoeSparseMoeBlock", "Ernie4_5_VLMoeSparseMoeBlock",
        "GptOssMLP", "GraniteMoeHybridMoE", "GraniteMoeMoE", "GraniteMoeSWAMoE", "GraniteMoeSharedMoE",
        "HunYuanMoEV1Moe", "LaraMiniSparseMoeBlock", "MellumSparseMoeBlock", "MiniMaxSparseMoeBlock", "Mistral4MoE",
        "MistralLarge4TextMoE", "MixtralSparseMoeBlock", "OpenAIPrivacyFilterMLP", "Qwen3NextSparseMoeBlock",
        "Qwen3OmniMoeTalkerTextSparseMoeBlock", "Qwen3OmniMoeThinkerTextSparseMoeBlock",
        "Qwen3VLMoeTextSparseMoeBlock", "Qwen3_5MoeSparseMoeBlock", "Qwen4ExpTextSparseMoeBlock",
    ),
    "sigmoid": ("Dots1MoE", "Kolibri1SparseMoeBlock"),
    "normalised sigmoid": (
        "AXK1MoE", "AXK2MoE", "AfmoeSparseMoeBlock", "BailingHybridMoE", "BeamMoE", "DeepseekV32MoE",
        "DeepseekV3MoE", "Dots3NoteTextMoE", "Dots3NoteVisionMoE", "ExaoneMoeSparseMoEBlock", "FlintSparseMoeBlock",
        "Glm4MoeLiteMoE", "Glm4MoeMoE", "Glm4vMoeTextMoE", "Glm5NextTextMoE", "GlmMoeDsaMoE", "HYV3MoE", "HYV4MoE",
        "HYV4VLMoE", "Inkling2LoopSparseMoeBlock", "Inkling2SparseMoeBlock", "KimiLinearMoE", "LagunaSparseMoeBlock",
        "Lfm2MoeSparseMoeBlock", "MiMoV2FlashMoE", "MiniMaxM2SparseMoeBlock", "MiniMaxM3VLSparseMoeBlock",
        "MuseSparkMoE", "NemotronHMoE", "SolarOpenMoE",
    ),
    "normalised root of softplus": ("DeepseekV4SparseMoeBlock",),
}  # fmt: skip
# Its weights share a softmax with those of the shared experts.
WITHOUT_FORMULA = ("InklingMoE",)
# Blocks that are whole decoder layers: tried in a model, below.
LAYERS = ("DiffusionGemmaDecoderTextLayer", "DiffusionGemmaEncoderTextLayer", "Gemma4TextDecoderLayer")
REFUSED = {
    "PhimoeSparseMoeBlock": ("2 experts", {}),  # one after the other, each by the scores that are left
    "ZayaSparseMoeBlock": ("1 experts", {}),  # among its experts and "none"
    "DeepseekV4SparseMoeBlock": ("6 experts", {"mlp_layer_types": ["hash_moe"]}),  # by a table of token ids
}
GROUPS: dict[str, Any] = {"n_group": 8, "topk_group": 2, "topk_method": "group_limited_greedy"}
SETTINGS: dict[str, dict[str, Any]] = {
    "HunYuanMoEV1Moe": {"num_experts": 8, "moe_topk": 2},
    "DeepseekV4SparseMoeBlock": {"mlp_layer_types": ["moe"]},
    "DeepseekV3MoE": {"n_group": 8, "topk_group": 2},
    # Scores of closed groups are set to 0 there, and taken as weights.
    **dict.fromkeys(("DeepseekV2Moe", "DeepseekOcr2TextMoe", "UnlimitedOcrTextMoe"), GROUPS),
}
TOKENS = (2, 5)
NAME = "block.experts"


class Watched(nn.Module):
    """A block, what its router gave and what its experts got."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self.block = new_block(name, modules_of_blocks()[name], **settings)
        self.router = next(x for x in self.block.children() if hasattr(x, "top_k"))
        self.router.register_forward_hook(self.see_logits)
        [self.inner] = [x for x in self.block.modules() if is_experts(x)]
        self.x_BLD, self.others = torch.randn(*TOKENS, WIDTH), dict[str, Tensor]()
        if name == "DeepseekV4SparseMoeBlock":
            self.others["input_ids"] = torch.ones(TOKENS, dtype=torch.int64)

    def see_logits(self, module: nn.Module, args: Any, out: Any) -> None:
        self.logits_TE: Tensor = out[0]

    def see_experts(self, module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        _, self.ids_TK, self.weight_TK = args

    def forward(self) -> None:
        with self.inner.register_forward_pre_hook(self.see_experts):  # behind what a context put there
            self.block(self.x_BLD, **self.others)

    def gradients(self, weight_TK: Tensor) -> list[Tensor]:
        pull_TK = torch.randn(weight_TK.shape, generator=torch.Generator().manual_seed(2))
        learned = [x for x in self.router.parameters() if x.requires_grad]
        found = torch.autograd.grad((pull_TK * weight_TK).sum(), learned, retain_graph=True, allow_unused=True)
        return [x for x in found if x is not None]


def replayed(watched: Watched) -> RoutingRecord:
    """Experts at random, of all groups; the record of a replay has to be the same."""
    with record_routing(watched) as free:
        watched()
    [choices] = free.layers[NAME]
    num_choices, total = choices.expert_NK.shape[1], choices.num_experts
    ids_BLK = torch.stack([torch.randperm(total)[:num_choices] for _ in range(10)]).unflatten(0, TOKENS)
    return RoutingRecord.of_experts({NAME: [ids_BLK]}, num_experts=total)


def test_every_block_of_transformers_is_here() -> None:
    named = [*(name for names in OF_FORMULA.values() for name in names), *WITHOUT_FORMULA, *LAYERS]
    assert sorted({*named, *REFUSED}) == sorted(modules_of_blocks())
    assert len(named) == len(set(named))


@pytest.mark.parametrize(
    ("formula", "name"), [(formula, name) for formula, names in OF_FORMULA.items() for name in names]
)
def test_weights_and_gradients_of_any_experts_are_those_of_the_formula(formula: str, name: str) -> None:
    watched = Watched(name, SETTINGS.get(name, {}))
    record = replayed(watched)
    of_free_TK = FORMULAS[formula](watched.logits_TE, watched.ids_TK)
    factor = (watched.weight_TK.sum() / of_free_TK.sum()).detach()
    torch.testing.assert_close(watched.weight_TK, factor * of_free_TK, rtol=1e-5, atol=1e-7)  # it is the formula
    with replay_routing(watched, record), record_routing(watched) as again:
        watched()
    assert again == record
    wanted_TK = factor * FORMULAS[formula](watched.logits_TE, watched.ids_TK)
    torch.testing.assert_close(watched.weight_TK, wanted_TK, rtol=1e-5, atol=1e-7)
    pairs = zip(watched.gradients(watched.weight_TK), watched.gradients(wanted_TK), strict=True)
    for got, wanted in pairs:
        assert float(wanted.abs().max()) > 1e-6
        assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("name", WITHOUT_FORMULA)
def test_no_replayed_expert_is_without_a_gradient(name: str) -> None:
    watched = Watched(name, {})
    record = replayed(watched)
    with replay_routing(watched, record), record_routing(watched) as again:
        watched()
    assert again == record
    [of_rows, *_] = watched.gradients(watched.weight_TK)
    assert bool((of_rows[watched.ids_TK.unique()].abs().amax(1) > 0).all())


@pytest.mark.parametrize("name", REFUSED)
def test_routers_that_choose_in_another_way_are_refused(name: str) -> None:
    count, settings = REFUSED[name]
    watched = Watched(name, settings)
    record = replayed(watched)  # it has a record

    def replay() -> None:
        with replay_routing(watched, record):
            watched()

    total = record.layers[NAME][0].num_experts
    assert refusal(replay) == (
        f"block.experts cannot replay a record: the router of {name} does not choose its {count} by one topk of all "
        f"{total} scores, so nothing can choose in its place"
    )


def test_a_layer_that_is_its_own_block_replays_and_recomputes() -> None:
    sizes = dict.fromkeys(("head_dim", "global_head_dim", "hidden_size_per_layer_input"), 8)
    config = AutoConfig.for_model(
        "gemma4_text", enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=16, **sizes,
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, vocab_size_per_layer_input=64, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    model.train()
    ids_BL = torch.randint(64, TOKENS)
    with record_routing(model) as free:
        model(input_ids=ids_BL, use_cache=False)
    names = ["model.layers.0.experts", "model.layers.1.experts"]
    assert list(free.layers) == names
    record = RoutingRecord.of_experts({name: [torch.randint(8, (*TOKENS, 2))] for name in names}, num_experts=8)
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        with replay_routing(model, record), record_routing(model) as again:
            logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
        assert again == record != free
        model.zero_grad()
        logits_BLV.square().sum().backward()
        gradients.append([layer.router.proj.weight.grad.clone() for layer in model.model.layers])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)
