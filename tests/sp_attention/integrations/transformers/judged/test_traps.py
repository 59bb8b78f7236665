"""What users do wrong with a Transformers model over ranks: the judge tells it from one process, and says what it is
where numbers can tell."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig

from moe_dispatch import ParallelMesh, sum_gradients
from moe_dispatch.testing import Comparison, Layout, Outcome, RankThreads, compare_with_one_process
from sp_attention import mean_cross_entropy
from sp_attention.integrations.transformers import Step, causal_lm_loss, shard_batch
from sp_attention.integrations.transformers.judged import TransformersSubject
from sp_attention.integrations.transformers.judged.batches import IGNORED, batch_of, real_logits
from sp_attention.integrations.transformers.judged.models import Drawn
from sp_attention.integrations.transformers.judged.shrunk import shrunk
from sp_attention.integrations.transformers.judged.strict import strict_where_float64
from tests.support.ranks import world

LENGTHS = (17, 1, 10, 5)
PADDED = Layout(sp=4, ep=4, batch=2, seq=33, lengths=LENGTHS, left_padding=(0, 9))
PACKED = Layout(sp=4, ep=4, batch=2, seq=33, lengths=LENGTHS, documents=((12, 12), (21, 21), (19, 19), (14, 14)))


class Trap(TransformersSubject):
    """A qwen3_moe with tied embeddings and the balance loss, or another; each method is where one can go wrong."""

    def __init__(self, kind: str = "qwen3_moe") -> None:
        more = {"tie_word_embeddings": True, "output_router_logits": True, "router_aux_loss_coef": 0.1}
        config = AutoConfig.for_model(kind, **(more if kind == "qwen3_moe" else {}))
        super().__init__(Drawn(shrunk(config)), "moe_dispatch")

    def cut(self, batch: dict[str, Tensor], mesh: ParallelMesh, layout: Layout) -> Step:
        return shard_batch(batch, mesh, lengths=layout.lengths)

    def inputs(self, step: Step) -> dict[str, Any]:
        return step.inputs

    def loss(self, model: Any, out: Any, step: Step) -> Tensor:
        return causal_lm_loss(model, out, step).share

    def sum(self, model: nn.Module, mesh: ParallelMesh) -> None:
        sum_gradients(model, group=world(), expert_group=mesh.expert.get_group("edp"))

    def step_share(self, model: Any, token_BL: Tensor, layout: Layout, mesh: ParallelMesh) -> Outcome:
        step = self.cut(batch_of(token_BL, layout), mesh, layout)
        with strict_where_float64(model):
            out = model(**self.inputs(step))
            loss = self.loss(model, out, step)
            loss.backward()
        self.sum(model, mesh)
        return Outcome(logits_BlV=real_logits(step.own(out.logits), step.real_Bl), loss=loss, tokens=step.sharding)


class PositionsOfTheShard(Trap):
    def inputs(self, step: Step) -> dict[str, Any]:
        place_l = torch.arange(step.fed_shape[1])
        return {**step.inputs, "position_ids": place_l.expand(step.fed_shape)}


class LostMask(Trap):
    def cut(self, batch: dict[str, Tensor], mesh: ParallelMesh, layout: Layout) -> Step:
        batch.pop("attention_mask", None)
        batch.pop("position_ids", None)
        return super().cut(batch, mesh, layout)


class LostDocuments(Trap):
    def cut(self, batch: dict[str, Tensor], mesh: ParallelMesh, layout: Layout) -> Step:
        step = super().cut(batch, mesh, layout)
        return replace(step, packed_options=step.padding_options)


class LostWindow(Trap):
    def __init__(self) -> None:
        super().__init__("gpt_oss")

    def share(self, whole: nn.Module, layout: Layout, mesh: ParallelMesh) -> Any:
        model = super().share(whole, layout, mesh)
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None
        return model


class LabelsShiftedInTheShard(Trap):
    def cut(self, batch: dict[str, Tensor], mesh: ParallelMesh, layout: Layout) -> Step:
        ends = torch.tensor(layout.lengths).cumsum(0) - 1
        target_BL = F.pad(batch.pop("labels"), (0, 1), value=IGNORED)[:, 1:].index_fill(1, ends, IGNORED)
        return super().cut({**batch, "shift_labels": target_BL}, mesh, layout)


class MeanOfTheShard(Trap):
    def loss(self, model: Any, out: Any, step: Step) -> Tensor:
        logits_tV, target_t = step.own(out.logits).flatten(0, 1), step.target_Bl.flatten()
        return F.cross_entropy(logits_tV, target_t, reduction="sum") / max(int((target_t >= 0).sum()), 1) / 4


class BalanceOfTheShard(Trap):
    def loss(self, model: Any, out: Any, step: Step) -> Tensor:
        return mean_cross_entropy(step.own(out.logits), step.target_Bl, group=world()).share + 0.1 * out.aux_loss / 4


class WholeLoss(Trap):
    def loss(self, model: Any, out: Any, step: Step) -> Tensor:
        loss = causal_lm_loss(model, out, step)
        return loss.share + (loss.whole - loss.share).detach()


class GradientsAveraged(Trap):
    def sum(self, model: nn.Module, mesh: ParallelMesh) -> None:
        super().sum(model, mesh)
        for name, parameter in model.named_parameters():
            if ".experts." not in name and parameter.grad is not None:
                parameter.grad /= 4


class ExpertsSummedOverEveryone(Trap):
    def sum(self, model: nn.Module, mesh: ParallelMesh) -> None:
        super().sum(model, mesh)
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                dist.all_reduce(parameter.grad)


class TiedTwice(Trap):
    def sum(self, model: nn.Module, mesh: ParallelMesh) -> None:
        super().sum(model, mesh)
        dist.all_reduce(model.get_parameter("model.embed_tokens.weight").grad)


def judged(make: Callable[[], Trap], layout: Layout) -> Comparison:
    return compare_with_one_process(make(), layout, torch.float64)


def test_without_a_mistake_nothing_differs(rank_threads: RankThreads) -> None:
    for make, layout in ((Trap, PADDED), (Trap, PACKED), (partial(Trap, "gpt_oss"), PACKED)):
        for comparison in rank_threads.run(judged, 4, make, layout):
            assert comparison.agrees, str(comparison)


OTHERWISE = (
    "logits agree and the loss does not: it counts targets, their mean or an auxiliary loss otherwise, e.g. labels"
)
FOUR = "4 (sp or ep or ranks)"
FIRST_ONLY = "logits agree in the first document of each row only: documents attend to those before them"
EXPERTS = "gradients of model.layers.0.mlp.experts.gate_up_proj, model.layers.0.mlp.experts.down_proj, "


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize(
    ("mistake", "layout", "differing", "told"),
    [
        (PositionsOfTheShard, PADDED, "logits loss", "logits agree on the tokens of rank 0 only"),
        (LostMask, PADDED, "logits loss", "logits differ in rows with padding only: it is attended to"),
        (LostMask, PACKED, "logits loss", FIRST_ONLY),
        (LostDocuments, PACKED, "logits loss", FIRST_ONLY),
        (LostWindow, PACKED, "logits loss", "logits agree at the first 7 places of each row"),
        (LabelsShiftedInTheShard, PADDED, "loss gradients", OTHERWISE),
        (MeanOfTheShard, PADDED, "loss gradients", OTHERWISE),
        (BalanceOfTheShard, PADDED, "loss gradients", OTHERWISE),
        (WholeLoss, PADDED, "loss", f"the loss is {FOUR} times that of one process"),
        (GradientsAveraged, PADDED, "gradients", f"are 1/{FOUR} of the reference: averaged over ranks"),
        (ExpertsSummedOverEveryone, PADDED, "gradients", EXPERTS),
        (ExpertsSummedOverEveryone, PADDED, "gradients", "are the same on every rank of ep: summed over ranks that"),
        (TiedTwice, PADDED, "gradients", f"gradients of model.embed_tokens.weight are {FOUR} times too large"),
    ],
)
def test_a_mistake_differs_and_is_named(
    rank_threads: RankThreads, mistake: Callable[[], Trap], layout: Layout, differing: str, told: str
) -> None:
    for comparison in rank_threads.run(judged, 4, mistake, layout):
        found = {difference.quantity: difference.value for difference in comparison.differences}
        assert all(found[quantity] > 1e-3 for quantity in differing.split()), str(comparison)
        assert "logits" in differing or found["logits"] < 1e-12
        assert told in "\n".join(comparison.words)
