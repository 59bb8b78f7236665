"""Models of Transformers as subjects: they agree, every weight matters, and what is not float64 is seen."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from moe_dispatch import ParallelMesh
from moe_dispatch.testing import Comparison, Layout, RankThreads, compare_with_one_process
from sp_attention.integrations.transformers.judged import TransformersSubject, subject_of
from sp_attention.integrations.transformers.judged.models import Drawn
from sp_attention.integrations.transformers.judged.shrunk import shrunk
from tests.support.transformers.models import FAMILIES

# Two rows packed into four documents; one padded row; a rank without tokens in each.
PACKED = Layout(
    sp=4, ep=4, batch=2, seq=33, lengths=(17, 1, 15, 0), documents=((12, 12), (21, 21), (19, 19), (14, 14))
)
PADDED = Layout(dp=2, sp=2, ep=4, batch=2, seq=33, lengths=(33, 0), left_padding=(0, 9))


def judged(what: str, layout: Layout, dtype: torch.dtype) -> Comparison:
    return compare_with_one_process(subject_of(what), layout, dtype)


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        # In a normal run each model meets one of the two.
        pytest.param(name, layout, marks=[pytest.mark.sweep] * ((i + j) % 2))
        for (i, name), (j, layout) in product(enumerate(FAMILIES), enumerate((PACKED, PADDED)))
    ],
)
def test_a_model_over_ranks_is_that_of_one_process(rank_threads: RankThreads, name: str, layout: Layout) -> None:
    for comparison in rank_threads.run(judged, layout.ranks, name, layout, torch.float64):
        assert comparison.agrees, str(comparison)
        assert comparison.words == ()
        assert max(difference.value for difference in comparison.differences) < 2e-14  # measured: 5e-15


def with_settings(kind: str, settings: dict[str, Any], layout: Layout) -> Comparison:
    config = AutoConfig.for_model(kind, **settings)
    subject = TransformersSubject(Drawn(shrunk(config)), "moe_dispatch")
    return compare_with_one_process(subject, layout, torch.float64)


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("deepseek_v3", {"output_router_logits": True}),  # it has router logits, and no balance loss
        ("qwen3_moe", {"output_router_logits": True, "router_aux_loss_coef": 0.1, "tie_word_embeddings": True}),
        ("phimoe", {"input_jitter_noise": 0.1}),  # its router draws in training, too
        ("mixtral", {"attention_dropout": 0.3, "router_jitter_noise": 0.1}),
        ("afmoe", {}),  # with a parameter that does not learn
    ],
)
def test_settings_that_change_loss_weights_or_randomness(
    rank_threads: RankThreads, kind: str, settings: dict[str, Any]
) -> None:
    for comparison in rank_threads.run(with_settings, 4, kind, settings, PADDED):
        assert comparison.agrees, str(comparison)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_matters(name: str) -> None:
    subject, layout = subject_of(name), Layout(batch=2, seq=33)
    model = subject.whole(layout)
    subject.step_whole(model, torch.randint(256, layout.shape), layout)
    sizes = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
    assert sizes.keys() == dict(model.named_parameters()).keys()
    assert min(sizes.values()) > 1e-4, min(sizes, key=lambda n: sizes[n])
    assert torch.equal(model.lm_head.weight, subject.whole(layout).lm_head.weight)


def through_float32(module: nn.Module, args: Any, x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():  # as code that the mode does not reach
        return x.to(torch.float32).to(x.dtype)


class RoundedOnce(TransformersSubject):
    """One activation of a rank's share passes through float32."""

    def share(self, whole: nn.Module, layout: Layout, mesh: ParallelMesh) -> Any:
        model = super().share(whole, layout, mesh)
        model.model.norm.register_forward_hook(through_float32)
        return model


def rounded(dtype: torch.dtype) -> Comparison:
    layout = Layout(sp=2, ep=2, batch=2, seq=33)
    return compare_with_one_process(RoundedOnce(subject_of("mixtral").maker, "moe_dispatch"), layout, dtype)


def test_one_rounding_to_float32_is_seen_in_float64_only(rank_threads: RankThreads) -> None:
    for comparison in rank_threads.run(rounded, 2, torch.float32):
        assert comparison.agrees
    for comparison in rank_threads.run(rounded, 2, torch.float64):
        logits, _, gradients, _ = comparison.differences
        assert 1e-9 < logits.value < 1e-6
        assert not gradients.agrees
