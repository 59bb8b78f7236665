"""The DeepSeek-style model as a subject: MoE layers, masks and targets as plain Python loops in one process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sp_attention import mean_cross_entropy

from .... import GroupedExperts, MoE, ParallelMesh, TokenSharding, TopKRouter, sequence_balance_loss
from ....judge.layout import Layout
from ....judge.subject import Outcome
from ....reference import ReferenceMoE, reference_balance_loss
from ..config.spreading import Spreading
from ..config.tables import ModelConfig
from .layout import OneProcess, OnMesh, everyone
from .model import DebugModel
from .packing import Packing
from .parallel import parallel_model


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugSubject:
    """See ``Subject``.

    Attributes:
        config: of the model.
        seed: of its weights.
        spreading: of its attention over "sp".
    """

    config: ModelConfig
    seed: int
    spreading: Spreading

    def whole(self, layout: Layout) -> DebugModel:
        """From the seed, in float64."""

        def make_moe(router: TopKRouter, shared: nn.Module | None) -> ReferenceMoE:
            experts = GroupedExperts(self.config.experts, self.config.dim, self.config.expert_hidden)
            return ReferenceMoE(router=router, experts=experts, shared=shared)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return DebugModel(self.config, make_moe).double()

    def share(self, whole: nn.Module, layout: Layout, mesh: ParallelMesh) -> DebugModel:
        return parallel_model(cast(DebugModel, whole), self.config, mesh)

    def step_whole(self, model: nn.Module, token_BL: Tensor, layout: Layout) -> Outcome:
        for module in model.modules():
            if isinstance(module, ReferenceMoE):
                module.update_bias(self.config.bias_rate)  # by the loads of the step before; none before the first
        whole = TokenSharding(batch=layout.batch, seq=layout.seq)
        logits_BLV, scores = model(token_BL, OneProcess(whole=whole, packing=packing_of(layout)))
        target_T = torch.tensor(reference_targets(token_BL.tolist(), layout.documents))
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), target_T, ignore_index=-100, reduction="sum")
        loss = loss / max(sum(target >= 0 for target in target_T.tolist()), 1)
        balance = sum(reference_balance_loss(scores_BLE, self.config.top_k) for scores_BLE in scores)
        loss = loss + self.config.balance_coefficient * balance
        loss.backward()
        return Outcome(logits_BlV=logits_BLV, loss=loss, tokens=whole)

    def step_share(self, model: nn.Module, token_BL: Tensor, layout: Layout, mesh: ParallelMesh) -> Outcome:
        for module in model.modules():
            if isinstance(module, MoE):
                module.update_bias(self.config.bias_rate, everyone())
        places = OnMesh.of(mesh, whole_rows=layout.sharding, packing=packing_of(layout), spreading=self.spreading)
        batch = places.my_batch(token_BL)
        logits_blV, scores = model(batch.token_Bl, places)
        # Each rank has a share of both losses, that of its own tokens.
        loss = mean_cross_entropy(logits_blV, batch.target_Bl, group=everyone()).share
        for scores_blE in scores:
            balance = sequence_balance_loss(
                scores_blE, top_k=self.config.top_k, sharding=places.tokens, group=everyone()
            )
            loss = loss + self.config.balance_coefficient * balance
        loss.backward()
        return Outcome(logits_BlV=logits_blV, loss=loss, tokens=places.tokens)

    def whole_gradient(self, name: str, gradient: Tensor, layout: Layout, mesh: ParallelMesh) -> Tensor:
        """Experts lie side by side over "ep"."""
        if ".experts." not in name:
            return gradient
        ep = mesh.expert.get_group("ep")
        parts: list[Tensor] = [gradient] * ep.size()
        dist.all_gather_object(parts, gradient.cpu(), group=ep)
        return torch.cat(parts)


def packing_of(layout: Layout) -> Packing:
    return Packing.of(seq=layout.seq, documents=layout.documents, window=layout.window)


def reference_targets(rows: list[list[int]], documents: Sequence[tuple[int, int]]) -> list[int]:
    """The token after each one, -100 at the end of a row or document and at padding."""
    targets = []
    for row in rows:
        start = 0
        for tokens, places in documents or [(len(row), len(row))]:
            targets += [*row[start + 1 : start + tokens], *[-100] * (places - max(tokens - 1, 0))]
            start += places
    return targets
