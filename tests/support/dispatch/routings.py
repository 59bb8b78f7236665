"""Which experts tokens choose: even, by scores, crowded, with holes, none."""

from collections.abc import Callable

import torch
from torch import Tensor


def uniform(scores_TE: Tensor, num_choices: int, experts: tuple[int, ...]) -> Tensor:
    return torch.randint(scores_TE.shape[1], (len(scores_TE), num_choices))


def top_k(scores_TE: Tensor, num_choices: int, experts: tuple[int, ...]) -> Tensor:
    best_TK = scores_TE.topk(min(num_choices, scores_TE.shape[1])).indices
    spare = num_choices - best_TK.shape[1]
    return torch.cat([best_TK, best_TK.new_full((len(scores_TE), spare), -1)], dim=1)


def one_expert(scores_TE: Tensor, num_choices: int, experts: tuple[int, ...]) -> Tensor:
    return torch.full((len(scores_TE), num_choices), scores_TE.shape[1] // 2)


def holes(scores_TE: Tensor, num_choices: int, experts: tuple[int, ...]) -> Tensor:
    expert_TK = uniform(scores_TE, num_choices, experts)
    return expert_TK.where(torch.rand(expert_TK.shape) < 0.5, -1)


def duplicates(scores_TE: Tensor, num_choices: int, experts: tuple[int, ...]) -> Tensor:
    expert_TK = uniform(scores_TE, num_choices, experts)
    return expert_TK.where(torch.rand(len(expert_TK), 1) < 0.5, expert_TK[:, :1])


def one_rank(scores_TE: Tensor, num_choices: int, experts: tuple[int, ...]) -> Tensor:
    rank = max(range(len(experts)), key=lambda rank: experts[rank])
    return torch.randint(experts[rank], (len(scores_TE), num_choices)) + sum(experts[:rank])


def without(unused: Callable[[int], int]) -> Callable[[Tensor, int, tuple[int, ...]], Tensor]:
    def route(scores_TE: Tensor, num_choices: int, experts: tuple[int, ...]) -> Tensor:
        expert_TK = uniform(scores_TE, num_choices, experts)
        num_experts = scores_TE.shape[1]
        return expert_TK.where(expert_TK != unused(num_experts), (unused(num_experts) + 1) % num_experts)

    return route


def none(scores_TE: Tensor, num_choices: int, experts: tuple[int, ...]) -> Tensor:
    return torch.full((len(scores_TE), num_choices), -1)


ROUTINGS: dict[str, Callable[[Tensor, int, tuple[int, ...]], Tensor]] = {
    "uniform": uniform,
    "top_k": top_k,
    "one_expert": one_expert,
    "holes": holes,
    "duplicates": duplicates,
    "one_rank": one_rank,
    "without_first": without(lambda num_experts: 0),
    "without_middle": without(lambda num_experts: num_experts // 2),
    "without_last": without(lambda num_experts: num_experts - 1),
    "none": none,
}
