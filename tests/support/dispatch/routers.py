"""Settings of a router, and a loop over tokens in plain Python floats, written from the papers, not from the code."""

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from moe_dispatch import TopKRouter

DIM, EXPERTS = 6, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The arguments of a router over 8 experts."""

    score: Literal["softmax", "sigmoid"] = "sigmoid"
    top_k: int = 3
    groups: int = 1
    limited_groups: int = 1
    judged_by: int = 2
    normalize: bool = True
    route_scale: float = 1.0

    def __str__(self) -> str:
        values = {part.name: (getattr(self, part.name), part.default) for part in fields(self)}
        return ", ".join(f"{name}={value}" for name, (value, default) in values.items() if value != default)

    def router(self, dtype: torch.dtype = torch.float64) -> TopKRouter:
        """A router with a bias large enough to change most choices."""
        torch.manual_seed(0)
        router = TopKRouter(
            DIM,
            EXPERTS,
            self.top_k,
            score=self.score,
            groups=self.groups,
            limited_groups=self.limited_groups,
            judged_by=self.judged_by,
            normalize=self.normalize,
            route_scale=self.route_scale,
        ).to(dtype)
        router.expert_bias_E.copy_(torch.randn(EXPERTS) / 4)
        return router


SETTINGS = [
    Setting(),
    Setting(score="softmax"),
    Setting(normalize=False),
    Setting(score="softmax", normalize=False, route_scale=16.0),
    Setting(route_scale=2.5),
    Setting(top_k=1),
    Setting(top_k=1, normalize=False),
    Setting(top_k=8),
    Setting(groups=4, limited_groups=2, judged_by=1, score="softmax"),
    Setting(groups=4, limited_groups=2, judged_by=2, route_scale=2.5),
    Setting(groups=2, limited_groups=1, judged_by=1),
    Setting(groups=2, limited_groups=1, judged_by=3, top_k=4),
    Setting(groups=4, limited_groups=4, judged_by=2, normalize=False),
    Setting(groups=8, limited_groups=3, judged_by=1),
]


def tokens(shape: tuple[int, ...] = (2, 5), dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, DIM, generator=generator, dtype=torch.float64).to(dtype)


def scores_by_hand(x: list[float], gate: list[list[float]], score: str) -> list[float]:
    logits = [math.fsum(a * b for a, b in zip(x, row, strict=True)) for row in gate]
    if score == "sigmoid":
        return [1 / (1 + math.exp(-logit)) for logit in logits]
    total = math.fsum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def experts_by_hand(scores: list[float], bias: list[float], setting: Setting) -> list[int]:
    """Greedy: strike the worst group until enough are left, then take the best expert K times."""
    size = len(scores) // setting.groups
    worth = {}
    for group in range(setting.groups):
        members = [scores[group * size + i] + bias[group * size + i] for i in range(size)]
        worth[group] = sum(sorted(members)[-setting.judged_by :])
    while len(worth) > setting.limited_groups:
        del worth[min(worth, key=lambda group: worth[group])]
    open_ids = [expert for expert in range(len(scores)) if expert // size in worth]
    chosen: list[int] = []
    while len(chosen) < setting.top_k:
        chosen.append(max(set(open_ids) - set(chosen), key=lambda expert: scores[expert] + bias[expert]))
    return chosen


def weights_by_hand(scores: list[float], chosen: list[int], setting: Setting) -> list[float]:
    total = math.fsum(scores[expert] for expert in chosen) if setting.normalize else 1.0
    return [setting.route_scale * scores[expert] / total for expert in chosen]
