"""One rank's part of a layer: plan, dispatch, experts, combine, backward; and whether rows are where they belong."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_dispatch import (
    Partition,
    combine,
    dispatch,
)
from tests.support.dispatch.dense import (
    Answer,
    Case,
    chosen_weights,
    crossings,
    rank_of_expert,
    rows_in_order,
    through_experts,
)
from tests.support.dispatch.plans import Planning, counted, sharding_of

Memory = Callable[[Tensor], Tensor]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MEMORIES: dict[str, Memory] = {
    "contiguous": lambda x_BlD: x_BlD,
    "transposed": lambda x_BlD: x_BlD.transpose(0, 2).contiguous().transpose(0, 2),
    "sliced": lambda x_BlD: torch.stack([x_BlD, x_BlD + 1], dim=-1)[..., 0],
    "rows apart": lambda x_BlD: torch.stack([x_BlD, x_BlD + 1], dim=1)[:, 0],
}


class Layer:
    """One rank's forward of a case, and its backward when asked."""

    def __init__(
        self,
        rank: int,
        case: Case,
        planning: Planning = counted,
        *,
        memory: Memory = MEMORIES["contiguous"],
        weigh_in_combine: bool = False,
        group_rank: int | None = None,
    ) -> None:
        """``rank`` tells the tokens, ``group_rank`` (``rank`` by default) the experts."""
        self.case, piece = case, case.layout.cut
        self.x_BlD, self.logits_BlE = (piece(t)[rank].clone().requires_grad_() for t in (case.x_BLD, case.logits_BLE))
        w_eDF = case.w_EDF.split(case.experts)[rank if group_rank is None else group_rank]
        self.w_eDF = w_eDF.clone().requires_grad_()
        self.expert_BlK = piece(case.expert_BLK)[rank]
        self.weight_BlK = chosen_weights(self.logits_BlE, self.expert_BlK)
        self.grad_BlF = memory(piece(case.grad_BLF)[rank])
        self.plan = planning(
            memory(self.expert_BlK),
            dim=case.x_BLD.shape[-1],
            sharding=sharding_of(case.layout),
            experts=Partition(case.experts),
            weight_BlK=self.weight_BlK,
        )
        self.x_MD, self.weight_M = dispatch(memory(self.x_BlD), memory(self.weight_BlK), self.plan)
        y_MF = self.experts(self.x_MD)
        if weigh_in_combine:
            self.y_BlF = combine(y_MF, self.plan, self.weight_M)
        else:
            self.y_BlF = combine(self.weight_M.unsqueeze(1) * y_MF, self.plan)

    @property
    def num_used(self) -> int:
        """Rows that belong to an expert; a plan of fixed sizes has more."""
        return int(self.plan.rows_per_expert_e.sum())

    def experts(self, x_MD: Tensor) -> Tensor:
        """Of rows of zeros, which belong to no expert, ones."""
        used_MF = through_experts(x_MD[: self.num_used], self.w_eDF, self.plan.rows_per_expert_e.tolist())
        return torch.cat([used_MF, used_MF.new_ones(len(x_MD) - self.num_used, used_MF.shape[1])])

    def backward(self) -> Answer:
        inputs = (self.x_BlD, self.weight_BlK, self.logits_BlE, self.w_eDF)
        x, weight, logits, w = torch.autograd.grad(self.y_BlF, inputs, self.grad_BlF, materialize_grads=True)
        return Answer(y=self.y_BlF.detach(), x=x, weight=weight, logits=logits, w=w)


def rows_of_rank(case: Case, rank: int) -> list[tuple[int, int, int]]:
    rank_of = rank_of_expert(case.experts)
    return [row for row in rows_in_order(case.expert_BLK.flatten(0, 1)) if rank_of[row[0]] == rank]


def misplaced_rows(layer: Layer, rank: int) -> list[str]:
    """Which facts about the rows that this rank's experts see are not those of the plain lists. All bit for bit."""
    case, plan, rows = layer.case, layer.plan, rows_of_rank(layer.case, rank)
    mine = range(sum(case.experts[:rank]), sum(case.experts[: rank + 1]))
    counts = [sum(expert == e for expert, _, _ in rows) for e in mine]
    token_M, choice_M = (torch.tensor([row[i] for row in rows], dtype=torch.int64) for i in (1, 2))
    weight_TK = chosen_weights(case.logits_BLE, case.expert_BLK).flatten(0, 1)
    checks = {
        "x_MD": layer.x_MD[: len(rows)].equal(case.x_BLD.flatten(0, 1)[token_M]),
        "weight_M": layer.weight_M[: len(rows)].equal(weight_TK[token_M, choice_M]),
        "rows_per_expert_e": plan.rows_per_expert_e.tolist() == counts,
        "token_of_row_M": plan.token_of_row_M[: len(rows)].equal(token_M),
        "unused rows": not layer.x_MD[len(rows) :].any(),
    }
    return [f"{name} is misplaced" for name, right in checks.items() if not right]


def misplaced(layer: Layer, rank: int) -> list[str]:
    """As above, with what a counted plan says of its rows."""
    case, plan = layer.case, layer.plan
    choice_M = torch.tensor([choice for _, _, choice in rows_of_rank(case, rank)], dtype=torch.int64)
    crossed = crossings(case.layout, case.experts, case.expert_BLK)
    checks = {
        "number of rows": layer.num_used == len(layer.x_MD) == len(choice_M),
        "choice_of_row_M": plan.choice_of_row_M.equal(choice_M),
        "rows_sent": plan.rows_sent == tuple(crossed[rank]),
        "rows_received": plan.rows_received == tuple(source[rank] for source in crossed),
        "local_shape": plan.local_shape == tuple(layer.x_BlD.shape),
    }
    return misplaced_rows(layer, rank) + [f"{name} is misplaced" for name, right in checks.items() if not right]


def failures_of(case: Case, found: list[str]) -> list[str]:
    return [f"{case.name}: {what}" for what in found]
