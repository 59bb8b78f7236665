"""Dispatch and combine in the background: the same rows, and what runs between start and finish runs meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_dispatch import (
    DispatchMetadata,
    GroupedExperts,
    MoE,
    Partition,
    StaticSizes,
    TokenSharding,
    TopKRouter,
    combine,
    dispatch,
    plan_dispatch,
    start_combine,
    start_dispatch,
)
from moe_dispatch.rows import row_exchange
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.plans import KINDS, Kind, planning
from tests.support.ranks import world

RANKS = 3
DIM = 4


class _Noted(torch.autograd.Function):
    """The identity; says when it runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list[str], name: str) -> Tensor:
        ctx.events, ctx.name = events, name
        events.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.events.append(f"backward of {ctx.name}")
        return grads[0], None, None


@contextmanager
def noted_exchanges(events: list[str]) -> Iterator[None]:
    """Says when an exchange of rows starts and when it is waited for."""
    start_exchange_into = row_exchange.start_exchange_into

    class Watched:
        def __init__(self, pending: Any) -> None:
            self.pending = pending

        def wait(self) -> Tensor:
            events.append("wait")
            return self.pending.wait()

    def start(*args: Any) -> Any:
        events.append("start")
        return Watched(start_exchange_into(*args))

    with mock.patch.object(row_exchange, "start_exchange_into", start):
        yield


class NotedShared(torch.nn.Module):
    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def forward(self, x_BlD: Tensor) -> Tensor:
        return _Noted.apply(x_BlD, self.events, "shared")  # type: ignore[return-value]


def events_of_layer(rank: int) -> list[str]:
    """What happens in forward and backward of an MoE layer with shared experts."""
    experts, sharding, events = Partition((2, 1, 2)), TokenSharding(batch=2, seq=Partition((3, 0, 2))), []
    moe = MoE(
        router=TopKRouter(DIM, 5, 2, score="sigmoid"),
        experts=GroupedExperts(experts.sizes[rank], DIM, 4),
        partition=experts,
        group=world(),
        shared=NotedShared(events),
    )
    x_BlD = torch.randn(*sharding.local_shape(rank), DIM).requires_grad_()
    with noted_exchanges(events):
        moe(x_BlD, sharding=sharding)[0].sum().backward()
    return events


def test_shared_experts_compute_while_rows_are_on_their_way(rank_pool: RankPool) -> None:
    forward = ["start", "shared", "wait", "start", "wait"]
    backward = ["start", "wait", "start", "backward of shared", "wait"]
    for events in rank_pool.run(events_of_layer, RANKS):
        assert events == forward + backward


def made(rank: int) -> tuple[Tensor, Tensor, DispatchMetadata]:
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 2)))
    shape = sharding.local_shape(rank)
    generator = torch.Generator().manual_seed(rank)
    x_BlD = torch.randn(*shape, DIM, generator=generator, dtype=torch.float64).requires_grad_()
    weight_BlK = torch.rand(*shape, 2, generator=generator, dtype=torch.float64).requires_grad_()
    expert_BlK = torch.randint(-1, 5, (*shape, 2), generator=generator)
    plan = plan_dispatch(expert_BlK, dim=DIM, sharding=sharding, experts=Partition((2, 1, 2)), group=world())
    return x_BlD, weight_BlK, plan


def in_background(rank: int, weighted: bool) -> tuple[list[str], list[str], bool]:
    """Events of forward, events of backward, and whether results and gradients equal those of the plain calls."""
    events: list[str] = []
    x_BlD, weight_BlK, plan = made(rank)
    with noted_exchanges(events):
        rows = start_dispatch(x_BlD, weight_BlK, plan)
        shared_BlD: Tensor = _Noted.apply(x_BlD, events, "shared")  # type: ignore[assignment]
        x_MD, weight_M = rows.finish()
        back = start_combine(x_MD * x_MD, plan, weight_M) if weighted else start_combine(x_MD * x_MD, plan)
        more_BlD: Tensor = _Noted.apply(x_BlD, events, "more")  # type: ignore[assignment]
        out_BlD = back.finish() + shared_BlD + more_BlD
        forward = events.copy()
        events.clear()
        out_BlD.sin().sum().backward()
    x2_BlD, weight2_BlK, plan = made(rank)
    x_MD, weight_M = dispatch(x2_BlD, weight2_BlK, plan)
    y_BlD = combine(x_MD * x_MD, plan, weight_M) if weighted else combine(x_MD * x_MD, plan)
    out2_BlD = y_BlD + x2_BlD + x2_BlD
    out2_BlD.sin().sum().backward()
    pairs = ((out_BlD, out2_BlD), (x_BlD.grad, x2_BlD.grad), (weight_BlK.grad, weight2_BlK.grad))
    return forward, events, all(a is not None and b is not None and (a - b).abs().sum() < 1e-12 for a, b in pairs)


@pytest.mark.parametrize("weighted", [True, False])
def test_what_runs_meanwhile_overlaps_forward_and_backward(rank_pool: RankPool, weighted: bool) -> None:
    for forward, backward, equal in rank_pool.run(in_background, RANKS, weighted):
        assert forward == ["start", "shared", "wait", "start", "more", "wait"]
        assert backward == ["start", "backward of more", "wait", "start", "backward of shared", "wait"]
        assert equal


def two_on_their_way(rank: int, kind: Kind) -> list[str]:
    """Two dispatches of one plan start before the first finishes, and two combines: every bit of what they give and
    of the gradients has to be that of one after the other.
    """
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 2, 1)))
    shape, found = sharding.local_shape(rank), []
    expert_BlK = torch.randint(-1, 6, (*shape, 2), generator=torch.Generator().manual_seed(rank))
    with planning(kind, rank, StaticSizes(rows_per_pair=6, rows=24)) as plan_of:
        plan = plan_of(expert_BlK, dim=DIM, sharding=sharding, experts=Partition((2, 0, 3, 1)))
        for at_once in (True, False):
            torch.manual_seed(rank)
            inputs = [
                (torch.randn(*shape, DIM).requires_grad_(), torch.rand(*shape, 2).requires_grad_()) for _ in "ab"
            ]
            if at_once:
                rows = [pending.finish() for pending in [start_dispatch(x, w, plan) for x, w in inputs]]
                back = [start_combine(x_MD.sin(), plan, weight_M) for x_MD, weight_M in rows]
                outputs = [pending.finish() for pending in back]
            else:
                rows = [dispatch(x, w, plan) for x, w in inputs]
                outputs = [combine(x_MD.sin(), plan, weight_M) for x_MD, weight_M in rows]
            loss = outputs[0].square().sum() + outputs[1].sin().sum()
            grads = torch.autograd.grad(loss, [tensor for pair in inputs for tensor in pair])
            found.append([*rows[0], *rows[1], *outputs, *grads])
    return [f"tensor {i}" for i, (one, other) in enumerate(zip(*found, strict=True)) if not one.equal(other)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_of_one_plan_are_on_their_way_at_once(rank_threads: RankThreads, kind: Kind) -> None:
    assert rank_threads.run(two_on_their_way, 4, kind) == [[]] * 4


def backward_twice(rank: int) -> bool:
    """The graph can be kept and run again: the exchanges of the second backward are its own."""
    x_BlD, weight_BlK, plan = made(rank)
    x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
    loss = combine(x_MD * x_MD, plan, weight_M).sum()
    first = torch.autograd.grad(loss, (x_BlD, weight_BlK), retain_graph=True)
    second = torch.autograd.grad(loss, (x_BlD, weight_BlK))
    return all(map(torch.equal, first, second))


def test_backward_of_a_kept_graph_runs_again(rank_pool: RankPool) -> None:
    assert rank_pool.run(backward_twice, RANKS) == [True] * RANKS


def finished_twice(rank: int) -> list[str]:
    """What a second ``finish()`` says, on every rank and before any collective."""
    x_BlD, weight_BlK, plan = made(rank)
    rows = start_dispatch(x_BlD, weight_BlK, plan)
    x_MD, _ = rows.finish()
    back = start_combine(x_MD, plan)
    back.finish()
    said = []
    for pending in (rows, back):
        with pytest.raises(RuntimeError) as error:
            pending.finish()
        said.append(str(error.value))
    return said


def test_rows_are_taken_once(rank_pool: RankPool) -> None:
    text = "these rows were taken already: finish() was called twice; call it once, and keep what it returns"
    assert rank_pool.run(finished_twice, RANKS) == [[text] * 2] * RANKS
