"""What dispatch, experts and combine have to compute: plain loops in float64 on one rank, and cases to try them on.

Shares no code with the library. Grids are cut by slicing, so that no index formula stands against another one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import cycle, product
from typing import Literal

import torch
from torch import Tensor

Order = Literal["BL", "LB"]
# Measured: 8e-15 at most over the cases; values and gradients are of order 1 to 10.
TOLERANCE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A (B, L) grid cut into rectangles, or (L, B) for order "LB"; rank r holds (r // len(seq), r % len(seq))."""

    batch: tuple[int, ...]
    seq: tuple[int, ...]
    order: Order = "BL"

    @property
    def ranks(self) -> int:
        return len(self.batch) * len(self.seq)

    @property
    def grid(self) -> tuple[int, int]:
        rows, length = sum(self.batch), sum(self.seq)
        return (rows, length) if self.order == "BL" else (length, rows)

    def cut(self, x_BLD: Tensor) -> list[Tensor]:
        """Every rank's piece of the whole, by slicing."""
        batch_dim, seq_dim = (0, 1) if self.order == "BL" else (1, 0)
        return [piece for rows in x_BLD.split(self.batch, batch_dim) for piece in rows.split(self.seq, seq_dim)]

    def ids(self) -> tuple[Tensor, Tensor, Tensor]:
        """The grids of global token ids, of rows and of positions."""
        return id_grids(sum(self.batch), sum(self.seq), self.order)


@cache
def id_grids(rows: int, length: int, order: Order) -> tuple[Tensor, Tensor, Tensor]:
    row_BL = torch.arange(rows).unsqueeze(1).expand(rows, length)
    position_BL = torch.arange(length).expand(rows, length)
    if order == "LB":
        row_BL, position_BL = row_BL.T, position_BL.T
    return torch.arange(rows * length).view(row_BL.shape), row_BL, position_BL


def compositions(total: int, pieces: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut ``total`` into that many consecutive pieces, empty ones included."""
    if pieces == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, pieces - 1):
            yield (first, *rest)


# ---- routing: which experts the tokens choose ------------------------------------------------------


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

EXPERTS: dict[int, list[tuple[int, ...]]] = {
    1: [(4,), (1,), (5,)],
    2: [(2, 2), (0, 3), (4, 1), (3, 0)],
    3: [(2, 2, 2), (3, 0, 2), (0, 1, 4), (1, 1, 0)],
    4: [(1, 1, 1, 1), (2, 0, 3, 1), (0, 4, 0, 0), (2, 2, 2, 2)],
}


def layouts(ranks: int) -> list[Layout]:
    """Shards that are even, uneven and empty; cut along the sequence, the batch and both; 0, 1, 2 and more tokens."""
    uneven = {1: [(5,)], 2: [(3, 2), (0, 5)], 3: [(3, 0, 2), (0, 1, 4)], 4: [(2, 0, 3, 1), (0, 2, 1, 2)]}[ranks]
    rest = (0,) * (ranks - 1)
    cuts = [((rows,), seq) for rows, seq in zip((2, 3), (*uneven, *uneven), strict=False)]
    cuts += [((2,), (2,) * ranks), ((2,), (*rest, 5)), (uneven[0], (3,))]
    cuts += [((2,), (*rest, 0)), ((1,), (*rest, 1)), ((1,), (2, *rest)), ((2,), (1, *rest))]
    if ranks == 4:
        cuts += [((2, 1), (3, 2)), ((0, 2), (1, 3)), ((1, 2), (2, 0))]
    return [Layout(batch=batch, seq=seq, order=order) for batch, seq in cuts for order in ("BL", "LB")]


# ---- one layer: experts are y = tanh(x @ w), another matrix for each expert -------------------------


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
