"""What dispatch, experts and combine have to compute: plain loops in float64 on one rank, and cases to try them on.

Shares no code with the library. Grids are cut by slicing, so that no index formula stands against another one.
"""

from dataclasses import dataclass, fields
from itertools import cycle, product

import torch
from torch import Tensor

from tests.support.dispatch.layouts import EXPERTS, Layout, layouts
from tests.support.dispatch.routings import ROUTINGS

# Measured: 8e-15 at most over the cases; values and gradients are of order 1 to 10.
TOLERANCE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Case:
    """The whole of one layer's input. ``grad_BLF`` is what comes back to its output."""

    name: str
    layout: Layout
    experts: tuple[int, ...]
    expert_BLK: Tensor
    logits_BLE: Tensor
    x_BLD: Tensor
    w_EDF: Tensor
    grad_BLF: Tensor


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the layer gives, whole or one rank's share of it: the output, and the gradient of every input."""

    y: Tensor
    x: Tensor
    weight: Tensor
    logits: Tensor
    w: Tensor

    def for_rank(self, rank: int, case: Case, group_rank: int | None = None) -> "Answer":
        """The share of the rank that holds tokens as ``rank`` and experts as ``group_rank`` (``rank`` by default)."""
        y, x, weight, logits = (case.layout.cut(t)[rank] for t in (self.y, self.x, self.weight, self.logits))
        w = self.w.split(case.experts)[rank if group_rank is None else group_rank]
        return Answer(y=y, x=x, weight=weight, logits=logits, w=w)


def chosen_weights(logits_BLE: Tensor, expert_BLK: Tensor) -> Tensor:
    """softmax over the experts, then the chosen ones; the weight of no expert is that of expert 0, and counts for
    nothing."""
    return logits_BLE.softmax(dim=-1).gather(-1, expert_BLK.clamp(min=0))


def dense_layer(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, w_EDF: Tensor) -> Tensor:
    rows = []
    for x_D, weight_K, expert_K in zip(x_TD, weight_TK, expert_TK.tolist(), strict=True):
        y_F = 0.0 * (x_D @ w_EDF[0])  # a token without experts stays in the graph
        for weight, expert in zip(weight_K, expert_K, strict=True):
            if expert >= 0:
                y_F = y_F + weight * torch.tanh(x_D @ w_EDF[expert])
        rows.append(y_F)
    return torch.stack(rows) if rows else x_TD @ w_EDF[0]


def dense_answer(case: Case) -> Answer:
    x_BLD, logits_BLE, w_EDF = (t.clone().requires_grad_() for t in (case.x_BLD, case.logits_BLE, case.w_EDF))
    weight_BLK = chosen_weights(logits_BLE, case.expert_BLK)
    y_TF = dense_layer(x_BLD.flatten(0, 1), weight_BLK.flatten(0, 1), case.expert_BLK.flatten(0, 1), w_EDF)
    y_BLF = y_TF.unflatten(0, case.layout.grid)
    inputs = (x_BLD, weight_BLK, logits_BLE, w_EDF)
    x, weight, logits, w = torch.autograd.grad(
        y_BLF, inputs, case.grad_BLF, allow_unused=True, materialize_grads=True
    )
    return Answer(y=y_BLF.detach(), x=x, weight=weight, logits=logits, w=w)


def make_case(
    layout: Layout, routing: str, *, experts: tuple[int, ...], num_choices: int, dim: int, width: int
) -> Case:
    num_experts = sum(experts)
    logits_BLE = torch.randn(*layout.grid, num_experts, dtype=torch.float64)
    expert_TK = ROUTINGS[routing](logits_BLE.flatten(0, 1), num_choices, experts)
    return Case(
        name=f"{layout} {routing} experts {experts} K {num_choices} D {dim} F {width}",
        layout=layout,
        experts=experts,
        expert_BLK=expert_TK.unflatten(0, layout.grid),
        logits_BLE=logits_BLE,
        x_BLD=torch.randn(*layout.grid, dim, dtype=torch.float64),
        w_EDF=torch.randn(num_experts, dim, width, dtype=torch.float64) / dim**0.5,
        grad_BLF=torch.randn(*layout.grid, width, dtype=torch.float64),
    )


def make_cases(ranks: int) -> list[Case]:
    """Every layout with every routing; expert partitions, K, D and the width of the output take turns."""
    # 3, 4 and 7 kinds in turn: each meets each of the others.
    shapes = cycle([(1, 1), (7, 3), (8, 8), (130, 2), (7, 7), (8, 1), (1, 5)])
    turns = zip(product(layouts(ranks), ROUTINGS), cycle(EXPERTS[ranks]), cycle((1, 2, 4)), shapes, strict=False)
    return [
        make_case(layout, routing, experts=experts, num_choices=num_choices, dim=dim, width=width)
        for (layout, routing), experts, num_choices, (dim, width) in turns
    ]


# ---- where rows go, with Python lists and sets -------------------------------------------------------


def rank_of_expert(experts: tuple[int, ...]) -> list[int]:
    return [rank for rank, size in enumerate(experts) for _ in range(size)]


def rows_in_order(expert_TK: Tensor) -> list[tuple[int, int, int]]:
    """(expert, token, choice) of every row there is, by expert, then token, then choice."""
    choices = expert_TK.tolist()
    return sorted((e, t, k) for t, expert_K in enumerate(choices) for k, e in enumerate(expert_K) if e >= 0)


def crossings(layout: Layout, experts: tuple[int, ...], expert_BLK: Tensor) -> list[list[int]]:
    """[source][destination]: how many distinct tokens of the one need an expert on the other."""
    rank_of = rank_of_expert(experts)
    counts = []
    for expert_tK in (piece.flatten(0, 1).tolist() for piece in layout.cut(expert_BLK)):
        pairs = {(t, rank_of[e]) for t, expert_K in enumerate(expert_tK) for e in expert_K if e >= 0}
        counts.append([sum(to == rank for _, to in pairs) for rank in range(len(experts))])
    return counts


def through_experts(x_MD: Tensor, w_eDF: Tensor, rows_per_expert: list[int]) -> Tensor:
    """Rows of each expert through its matrix; without any row still in the graph."""
    none_0F = x_MD[:0] @ w_eDF.new_zeros(w_eDF.shape[1:])
    pieces = x_MD.split(rows_per_expert)
    return torch.cat([none_0F, *(torch.tanh(x_mD @ w_DF) for x_mD, w_DF in zip(pieces, w_eDF, strict=True))])


def differences(got: Answer, wanted: Answer) -> list[str]:
    found = []
    for field in fields(Answer):
        a, b = getattr(got, field.name), getattr(wanted, field.name)
        if a.shape != b.shape or a.dtype != b.dtype:
            found.append(f"{field.name} is {tuple(a.shape)} of {a.dtype}, not {tuple(b.shape)} of {b.dtype}")
        elif not (error := (a - b).abs().max().item() if a.numel() else 0.0) <= TOLERANCE:
            found.append(f"{field.name} is off by {error:.2e}")
    return found
