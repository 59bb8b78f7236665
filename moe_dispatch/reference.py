"""The same MoE layer on one rank, with plain Python loops: what everything else is compared with.

It reads the parameters and settings of the library's modules, and calls none of their code.
"""

import torch
from torch import Tensor, nn

from .layer.experts import GroupedExperts
from .layer.router import TopKRouter


class ReferenceMoE(nn.Module):
    """MoE with every expert here, one token and one choice at a time. Its state dict has the names of :class:`MoE`'s.

    Args:
        router: its parameters and settings are read; it is not called.
        experts: all E of them; likewise.
        shared: called as it is.

    Attributes:
        load_E: choices that fell on each expert since :meth:`update_bias`, as in :class:`MoE`.
    """

    def __init__(self, *, router: TopKRouter, experts: GroupedExperts, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.load_E = [0] * router.num_experts

    def forward(
        self, x_BLD: Tensor, *, real_BL: Tensor | None = None, expert_BLK: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, L, D) tokens -> (B, L, D) output and (B, L, E) scores; 0 where ``real_BL`` is False. ``expert_BLK``
        takes the place of the router's choice."""
        gates, ups, downs = (p.unbind(0) for p in (self.experts.gate_eDF, self.experts.up_eDF, self.experts.down_eFD))
        outputs, all_scores = [], []
        for token, x_D in enumerate(x_BLD.flatten(0, 1).unbind(0)):
            if real_BL is not None and not real_BL.flatten()[token]:
                all_scores.append(self.router.weight_ED.new_zeros(self.router.num_experts))
                outputs.append(torch.zeros_like(x_D))
                continue
            scores_E = token_scores(x_D, self.router)
            all_scores.append(scores_E)
            if expert_BLK is None:
                chosen = token_experts(scores_E, self.router)
            else:
                chosen = [expert for expert in expert_BLK.flatten(0, 1)[token].tolist() if expert >= 0]
            y_D = torch.zeros_like(x_D)
            for expert, weight in zip(chosen, token_weights(scores_E, chosen, self.router), strict=True):
                hidden_F = x_D @ gates[expert]
                hidden_F = hidden_F / (1 + torch.exp(-hidden_F)) * (x_D @ ups[expert])
                y_D = y_D + weight.to(x_D.dtype) * (hidden_F @ downs[expert])
                self.load_E[expert] += self.training
            outputs.append(y_D)
        if not outputs:
            return x_BLD * 1, x_BLD.new_zeros(*x_BLD.shape[:2], self.router.num_experts)
        y_BLD = torch.stack(outputs).view_as(x_BLD)
        if self.shared is not None:
            shared_BLD = self.shared(x_BLD)
            if real_BL is not None:
                shared_BLD = torch.where(real_BL.unsqueeze(-1), shared_BLD, 0.0)
            y_BLD = y_BLD + shared_BLD
        return y_BLD, torch.stack(all_scores).view(*x_BLD.shape[:2], -1)

    def update_bias(self, rate: float) -> None:
        """One step up for an expert below the mean load, one down above it."""
        mean = sum(self.load_E) / len(self.load_E)
        for expert, load in enumerate(self.load_E):
            step = rate if load < mean else -rate if load > mean else 0.0
            self.router.expert_bias_E[expert] += step
        self.load_E = [0] * len(self.load_E)


def token_scores(x_D: Tensor, router: TopKRouter) -> Tensor:
    """(E,) scores of one token."""
    dtype = torch.promote_types(x_D.dtype, torch.float32)
    logits = [(x_D.to(dtype) * gate_D.to(dtype)).sum() for gate_D in router.weight_ED.unbind(0)]
    if router.score == "sigmoid":
        return torch.stack([1 / (1 + torch.exp(-logit)) for logit in logits])
    largest = max(logit.item() for logit in logits)
    exponentials = [torch.exp(logit - largest) for logit in logits]
    return torch.stack(exponentials) / sum(exponentials)


def token_experts(scores_E: Tensor, router: TopKRouter) -> list[int]:
    """The K experts of one token, best first; the lower id on a tie."""
    biased = [score + bias for score, bias in zip(scores_E.tolist(), router.expert_bias_E.tolist(), strict=True)]
    size = len(biased) // router.groups
    groups = [range(group * size, (group + 1) * size) for group in range(router.groups)]
    worth = [sum(sorted((biased[expert] for expert in group), reverse=True)[: router.judged_by]) for group in groups]
    best = sorted(range(router.groups), key=lambda group: -worth[group])[: router.limited_groups]
    open_experts = [expert for group in sorted(best) for expert in groups[group]]
    return sorted(open_experts, key=lambda expert: -biased[expert])[: router.top_k]


def token_weights(scores_E: Tensor, chosen: list[int], router: TopKRouter) -> list[Tensor]:
    """The weight of each chosen expert of one token."""
    weights = [scores_E[expert] for expert in chosen]
    if router.normalize:
        total = torch.stack(weights).sum() + 1e-20
        weights = [weight / total for weight in weights]
    return [weight * router.route_scale for weight in weights]


def reference_balance_loss(scores_BLE: Tensor, top_k: int) -> Tensor:
    """Mean over the sequences of ``sum_i f_i P_i`` (DeepSeek-V3, equations 17 to 20), one token at a time."""
    losses = []
    for scores_LE in scores_BLE.unbind(0):
        scores_LE = scores_LE[[bool(scores_E.any()) for scores_E in scores_LE]]
        length, num_experts = scores_LE.shape
        if not length:
            continue
        counts = [0] * num_experts
        probability_E = scores_LE.new_zeros(num_experts)
        for scores_E in scores_LE.unbind(0):
            values = scores_E.tolist()
            for expert in sorted(range(num_experts), key=lambda expert: -values[expert])[:top_k]:
                counts[expert] += 1
            probability_E = probability_E + scores_E / scores_E.sum() / length
        scale = num_experts / (top_k * max(length, 1))
        losses.append(sum(scale * count * probability_E[expert] for expert, count in enumerate(counts)))
    return sum(losses, start=torch.zeros((), device=scores_BLE.device)) / max(len(losses), 1)
