"""Dispatch, experts and combine in any order of tokens: the bits of contiguous shards, the dense layer to 1e-12."""

from dataclasses import dataclass
from itertools import chain

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, StaticSizes, TokenSharding, combine, dispatch, gather_tokens, place_tokens
from moe_dispatch.testing import RankThreads
from tests.support.dispatch.dense import TOLERANCE, dense_layer, through_experts
from tests.support.dispatch.layouts import EXPERTS
from tests.support.dispatch.plans import KINDS, Kind, planning
from tests.support.orders import contiguous, cut_by_loops, shardings, whole_by_loops
from tests.support.ranks import world
from tests.support.tensors import Order, difference, grad_of, leaf

pytestmark = pytest.mark.usefixtures("uncovered")

DIM, TOP_K = 5, 2


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Of the whole batch, batch first."""

    x_BLD: Tensor
    weight_BLK: Tensor
    expert_BLK: Tensor
    pull_BLD: Tensor
    w_EDD: Tensor


def inputs_of(sharding: TokenSharding, num_experts: int) -> Inputs:
    draw = torch.Generator().manual_seed(sharding.num_tokens)
    grid = sharding.batch.total, sharding.seq.total

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return Inputs(
        x_BLD=randn(*grid, DIM),
        weight_BLK=randn(*grid, TOP_K),
        expert_BLK=torch.randint(-1, num_experts, (*grid, TOP_K), generator=draw),
        pull_BLD=randn(*grid, DIM),
        w_EDD=randn(num_experts, DIM, DIM),
    )


def run_layers(
    rank: int, cases: list[tuple[Inputs, TokenSharding]], experts: tuple[int, ...], kind: Kind
) -> list[dict[str, Tensor]]:
    """Output and gradients of this rank, of each case."""
    most = max(sharding.num_tokens for _, sharding in cases)
    found = []
    with planning(kind, rank, StaticSizes(rows_per_pair=most, rows=most * TOP_K)) as plan_of:
        for of, sharding in cases:
            x_BlD, weight_BlK = (leaf(cut_by_loops(x, sharding, rank)) for x in (of.x_BLD, of.weight_BLK))
            w_eDD = leaf(of.w_EDD.split(experts)[rank])
            plan = plan_of(
                cut_by_loops(of.expert_BLK, sharding, rank),
                dim=DIM,
                sharding=sharding,
                experts=Partition(experts),
                weight_BlK=weight_BlK,
            )
            x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
            rows_per_expert = plan.rows_per_expert_e.tolist()
            y_MD = through_experts(x_MD[: sum(rows_per_expert)], w_eDD, rows_per_expert)
            y_MD = torch.cat([y_MD, y_MD.new_zeros(len(x_MD) - len(y_MD), DIM)])  # unused rows of fixed sizes
            y_BlD = combine(y_MD, plan, weight_M)
            pull_BlD, inputs = cut_by_loops(of.pull_BLD, sharding, rank), (x_BlD, weight_BlK, w_eDD)
            dx, dweight, dw = torch.autograd.grad(y_BlD, inputs, pull_BlD, materialize_grads=True)
            found.append({"y": y_BlD.detach(), "dx": dx, "dweight": dweight, "dw": dw})
    return found


def together(found: tuple[dict[str, Tensor], ...], sharding: TokenSharding) -> dict[str, Tensor]:
    whole = {name: whole_by_loops([x[name] for x in found], sharding) for name in ("y", "dx", "dweight")}
    return whole | {"dw": torch.cat([x["dw"] for x in found])}


def dense(of: Inputs) -> dict[str, Tensor]:
    x_BLD, weight_BLK, w_EDD = map(leaf, (of.x_BLD, of.weight_BLK, of.w_EDD))
    y_TD = dense_layer(x_BLD.flatten(0, 1), weight_BLK.flatten(0, 1), of.expert_BLK.flatten(0, 1), w_EDD)
    pull_TD = of.pull_BLD.flatten(0, 1)
    dx, dweight, dw = torch.autograd.grad(y_TD, (x_BLD, weight_BLK, w_EDD), pull_TD, materialize_grads=True)
    return {"y": y_TD.detach().view(of.x_BLD.shape), "dx": dx, "dweight": dweight, "dw": dw}


@pytest.mark.parametrize("kind", [*KINDS, "by counts"])
@pytest.mark.parametrize("order", ["BL", "LB"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_bits_of_contiguous_shards(ranks: int, order: Order, kind: Kind, rank_threads: RankThreads) -> None:
    experts = EXPERTS[ranks][-2]
    in_order = list(chain(*(shardings(ranks, rows, order) for rows in (1, 2))))
    pairs = [(inputs_of(sharding, sum(experts)), sharding) for sharding in in_order]
    plain = [(of, contiguous(sharding)) for of, sharding in pairs]
    found = list(zip(*rank_threads.run(run_layers, ranks, [*pairs, *plain], experts, kind), strict=True))
    for (of, sharding), (_, other), mine, wanted in zip(
        pairs, plain, found[: len(pairs)], found[len(pairs) :], strict=True
    ):
        got, same = together(mine, sharding), together(wanted, other)
        assert [name for name in got if not torch.equal(got[name], same[name])] == [], sharding
        off = {name: difference(got[name], x) for name, x in dense(of).items()}
        assert max(off.values()) <= TOLERANCE, (sharding, off)


def gathered(rank: int, sharding: TokenSharding) -> tuple[Tensor, Tensor, Tensor]:
    """The whole from all ranks, what this rank places, and the gradient of both."""
    x_BLD = torch.arange(3.0 * sharding.num_tokens).view(sharding.batch.total, sharding.seq.total, 3)
    x_BlD = leaf(cut_by_loops(x_BLD, sharding, rank))
    whole_BLD = gather_tokens(x_BlD, sharding=sharding, group=world())
    placed_BLD = place_tokens(x_BlD, sharding=sharding, rank=rank)
    ((whole_BLD * whole_BLD.detach() / sharding.num_ranks).sum() + (placed_BLD * whole_BLD.detach()).sum()).backward()
    assert torch.equal(grad_of(x_BlD), 2 * x_BlD.detach())
    return whole_BLD.detach(), placed_BLD.detach(), x_BLD


@pytest.mark.parametrize("order", ["BL", "LB"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_whole_is_gathered_and_placed_in_its_own_order(
    ranks: int, order: Order, rank_threads: RankThreads
) -> None:
    for sharding in shardings(ranks, 2, order):
        found = rank_threads.run(gathered, ranks, sharding)
        x_BLD = found[0][2] if order == "BL" else found[0][2].transpose(0, 1)
        assert all(torch.equal(whole, x_BLD) for whole, _, _ in found)
        assert torch.equal(torch.stack([placed for _, placed, _ in found]).sum(0), x_BLD)
