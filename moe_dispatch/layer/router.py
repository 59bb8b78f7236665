"""Which experts a token goes to, and with what weight."""

from collections.abc import Callable
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TopKRouter(nn.Module):
    """The top-k router of the DeepSeek models, in three steps: scores, choice, weights.

    Everything is computed in float32 (float64 for float64 input), whatever the dtype of ``x`` and of the weight. The
    bias decides the choice only and never enters a weight.

    Sources: DeepSeek-V2 (arXiv:2405.04434), softmax scores and group-limited choice by each group's best expert;
    DeepSeek-V3 (arXiv:2412.19437), sigmoid scores, auxiliary-loss-free bias and groups judged by their two best
    experts.

    Args:
        dim: width D of the tokens.
        num_experts: E, of all ranks.
        top_k: K, experts per token.
        score: ``"softmax"`` over the experts, or ``"sigmoid"`` of each.
        groups: the experts form this many equal groups (one per node in DeepSeek-V3).
        limited_groups: a token may use experts of this many groups.
        judged_by: a group is as good as its ``judged_by`` best experts together: 1 in DeepSeek-V2, 2 in DeepSeek-V3.
        normalize: weights of a token sum to ``route_scale``. With K = 1 the router then gets no gradient.
        route_scale: factor on the weights.

    Attributes:
        weight_ED: the gate.
        expert_bias_E: added to the scores for the choice; float32, also where the model is cast to less; part of the
            state dict, moved by :meth:`update_bias`.

    Raises:
        ValueError: numbers that do not fit together.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        score: Literal["softmax", "sigmoid"],
        groups: int = 1,
        limited_groups: int = 1,
        judged_by: int = 2,
        normalize: bool = True,
        route_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f'score is {score!r}; use "softmax" or "sigmoid"')
        if groups < 1 or num_experts % groups or not 1 <= limited_groups <= groups:
            raise ValueError(
                f"{num_experts} experts in {groups} groups of which a token uses {limited_groups}; groups have to "
                f"divide the experts, and limited_groups has to be 1 to {groups}"
            )
        group_size = num_experts // groups
        if not 1 <= judged_by <= group_size and groups > 1:
            raise ValueError(
                f"groups of {group_size} experts judged by their {judged_by} best; use 1 to {group_size}"
            )
        if not 1 <= top_k <= limited_groups * group_size:
            raise ValueError(
                f"top_k is {top_k}, but a token can choose among {limited_groups * group_size} experts "
                f"({limited_groups} groups of {group_size}); use 1 to {limited_groups * group_size}"
            )
        self.dim, self.num_experts, self.top_k, self.score = dim, num_experts, top_k, score
        self.groups, self.limited_groups, self.judged_by = groups, limited_groups, judged_by
        self.normalize, self.route_scale = normalize, route_scale
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim))
        self.expert_bias_E: Tensor
        self.register_buffer("expert_bias_E", torch.zeros(num_experts, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gate normal with standard deviation D ** -0.5, bias 0."""
        nn.init.normal_(self.weight_ED, std=self.dim**-0.5)
        nn.init.zeros_(self.expert_bias_E)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``model.bfloat16()`` would round the bias, and so send tokens to other experts."""
        bias_E = self.expert_bias_E
        super()._apply(fn, recurse)
        if self.expert_bias_E.itemsize < torch.float32.itemsize:
            self.expert_bias_E = bias_E.to(self.expert_bias_E.device, torch.float32)
        return self

    def forward(self, x_BlD: Tensor) -> Tensor:
        """(..., D) tokens -> (..., E) scores in float32, or float64 for float64."""
        dtype = torch.promote_types(x_BlD.dtype, torch.float32)
        # Autocast would run the product in low precision, and a bfloat16 score moves tokens to other experts.
        with torch.autocast(x_BlD.device.type, enabled=False):
            logits_BlE = F.linear(x_BlD.to(dtype), self.weight_ED.to(dtype))
        return logits_BlE.sigmoid() if self.score == "sigmoid" else logits_BlE.softmax(-1)

    @torch.no_grad()
    def choose(self, scores_BlE: Tensor) -> Tensor:
        """(..., E) scores -> (..., K) int64 ids of the best experts under the bias, within the best groups."""
        biased_BlE = scores_BlE + self.expert_bias_E
        if self.groups > 1:
            grouped_BlGE = biased_BlE.unflatten(-1, (self.groups, -1))
            worth_BlG = grouped_BlGE.topk(self.judged_by, dim=-1).values.sum(-1)
            best_BlG = worth_BlG.topk(self.limited_groups, dim=-1).indices
            closed_BlG = torch.ones_like(worth_BlG, dtype=torch.bool).scatter(-1, best_BlG, False)
            biased_BlE = grouped_BlGE.masked_fill(closed_BlG.unsqueeze(-1), -torch.inf).flatten(-2)
        return biased_BlE.topk(self.top_k, dim=-1).indices

    def weigh(self, scores_BlE: Tensor, expert_BlK: Tensor) -> Tensor:
        """(..., E) scores of which (..., K) were chosen -> (..., K) weights; 0 for "no expert" (-1)."""
        weight_BlK = scores_BlE.gather(-1, expert_BlK.clamp(min=0)).masked_fill(expert_BlK < 0, 0.0)
        if self.normalize:
            weight_BlK = weight_BlK / (weight_BlK.sum(-1, keepdim=True) + 1e-20)
        return weight_BlK * self.route_scale

    @torch.no_grad()
    def update_bias(self, load_E: Tensor, rate: float) -> None:
        """Auxiliary-loss-free balancing (arXiv:2408.15664): one ``rate`` up for an expert below the mean load, one
        down above it.

        Args:
            load_E: choices that fell on each expert, of all tokens of the step on all ranks.
            rate: the step, 0.001 in DeepSeek-V3.

        Raises:
            ValueError: a bias in low precision, where steps of ``rate`` vanish beside it.
        """
        if self.expert_bias_E.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"expert_bias_E is {self.expert_bias_E.dtype}, in which small steps are lost; keep it in float32, "
                "e.g. router.expert_bias_E = router.expert_bias_E.float() after load_state_dict(assign=True), and "
                "MixedPrecision(buffer_dtype=torch.float32) for FSDP1"
            )
        # In integers: float32 counts to 2 ** 24, and a mean of counts is seldom one of its numbers.
        load_E = load_E if load_E.is_floating_point() else load_E.to(torch.int64)
        below_E = (load_E.sum() - load_E * self.num_experts).sign()
        self.expert_bias_E.add_(below_E.to(self.expert_bias_E.dtype), alpha=rate)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, score={self.score!r}, "
            f"groups={self.groups}, limited_groups={self.limited_groups}, normalize={self.normalize}, "
            f"route_scale={self.route_scale}"
        )
