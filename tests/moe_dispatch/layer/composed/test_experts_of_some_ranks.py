"""Experts that are frozen, have no parameters or skip work on some ranks only: nobody leaves backward to others.

Public reports of the kind: a rank whose experts got no token hung, as nothing of its graph led to the exchange.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_dispatch import GroupedExperts, MoE
from moe_dispatch.testing import RankThreads
from tests.support.dispatch.moe import Case
from tests.support.tensors import TOLERANCE, difference, leaf

CASE = Case(seq=(3, 0, 2, 1), experts=(2, 0, 1, 2))


class Zeros(GroupedExperts):
    """Without rows, zeros that nothing led to."""

    def forward(self, x_MD: Tensor, rows_per_expert_e: Tensor, weight_M: Tensor) -> Tensor:
        return super().forward(x_MD, rows_per_expert_e, weight_M) if len(x_MD) else torch.zeros_like(x_MD)


class ParametersAlone(GroupedExperts):
    """Without rows, zeros that parameters led to, and rows did not."""

    def forward(self, x_MD: Tensor, rows_per_expert_e: Tensor, weight_M: Tensor) -> Tensor:
        if len(x_MD):
            return super().forward(x_MD, rows_per_expert_e, weight_M)
        return torch.zeros_like(x_MD) + 0 * sum(weight.sum() for weight in self.parameters())


class Identity(nn.Module):
    """Saves nothing for backward, and has no parameters."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x_MD: Tensor, rows_per_expert_e: Tensor, weight_M: Tensor) -> Tensor:
        return x_MD.view_as(x_MD)


def gradients(moe: MoE, rank: int, checkpointed: bool, of_tokens: bool) -> dict[str, Tensor]:
    """All choices fall on the first rank's experts, so the others get no rows."""
    x_BlD, pull_BlD, _ = CASE.shards(rank)
    x_BlD = leaf(x_BlD).requires_grad_(of_tokens)
    expert_BlK = torch.arange(2).expand(*x_BlD.shape[:2], 2).contiguous()

    def run(x_BlD: Tensor) -> Tensor:
        return moe(x_BlD, sharding=CASE.sharding, expert_BlK=expert_BlK)[0]

    y_BlD = checkpoint(run, x_BlD, use_reentrant=False) if checkpointed else run(x_BlD)
    (y_BlD * pull_BlD).sum().backward()
    named = {"x": x_BlD, **dict(moe.named_parameters())}
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in named.items()}


def skipping_off_by(rank: int, kind: type[GroupedExperts], checkpointed: bool, of_tokens: bool) -> float:
    found: list[dict[str, Tensor]] = []
    for of_kind in (GroupedExperts, kind):
        moe = CASE.layer(rank)
        moe.experts.__class__ = of_kind
        if not of_tokens:
            moe.requires_grad_(False).experts.requires_grad_()
        found.append(gradients(moe, rank, checkpointed, of_tokens))
    return max(difference(found[1][name], wanted) for name, wanted in found[0].items())


@pytest.mark.parametrize("of_tokens", [True, False])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", [Zeros, ParametersAlone])
def test_experts_without_rows_may_skip_their_work(
    rank_threads: RankThreads, kind: type[GroupedExperts], checkpointed: bool, of_tokens: bool
) -> None:
    assert max(rank_threads.run(skipping_off_by, 4, kind, checkpointed, of_tokens)) <= TOLERANCE


def frozen_off_by(rank: int, checkpointed: bool) -> float:
    """What is not frozen has the gradients that it has where nothing is."""
    wanted = gradients(CASE.layer(rank), rank, checkpointed, True)
    moe = CASE.layer(rank)
    if rank == 3:
        moe.experts.requires_grad_(False)
    found = gradients(moe, rank, checkpointed, True)
    return max(difference(x, wanted[name]) for name, x in found.items() if rank != 3 or "experts" not in name)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_experts_of_one_rank_may_be_frozen(rank_threads: RankThreads, checkpointed: bool) -> None:
    assert max(rank_threads.run(frozen_off_by, 4, checkpointed)) <= TOLERANCE


def identity_off_by(rank: int) -> float:
    """Recomputed or not is the same."""
    moe = CASE.layer(rank)
    moe.shared = None
    if rank == 3:
        moe.experts = Identity(2)  # type: ignore[assignment]
    x_BlD, pull_BlD, _ = CASE.shards(rank)
    found: list[Tensor] = []
    for run in (moe, lambda x_BlD, **options: checkpoint(moe, x_BlD, use_reentrant=False, **options)):
        leaf_BlD = leaf(x_BlD)
        (run(leaf_BlD, sharding=CASE.sharding)[0] * pull_BlD).sum().backward()
        assert leaf_BlD.grad is not None
        found.append(leaf_BlD.grad)
    return difference(found[1], found[0])


def test_a_rank_whose_experts_save_nothing_recomputes_with_the_others(rank_threads: RankThreads) -> None:
    assert rank_threads.run(identity_off_by, 4) == [0.0] * 4
