"""sum_gradients: those of one process, on every rank, wherever a gradient is missing; few messages."""

from unittest.mock import patch

import pytest
import torch
from torch import nn

from moe_dispatch import sum_gradients
from moe_dispatch.testing import RankPool, RankThreads
from moe_dispatch.testing.counting import counting
from moe_dispatch.training.gradients import ALONE_BYTES, BUCKET_BYTES, buckets
from tests.support.dispatch.training import LAYOUTS, Layout
from tests.support.ranks import world
from tests.support.tensors import TOLERANCE, difference, grad_of


def off_by(rank: int, layout: Layout) -> dict[str, float]:
    """How far each gradient is from that of one process, after two backwards."""
    wanted = layout.backward_whole(layout.whole())
    mesh = layout.mesh()
    ep, edp = mesh.expert.get_group("ep"), mesh.expert.get_group("edp")
    model = layout.part(ep)
    layout.backward(model, rank, mesh.ep_ranks, 0.25)
    layout.backward(model, rank, mesh.ep_ranks, 0.75)
    sum_gradients(model, group=world(), expert_group=edp)
    mine = layout.cut(wanted, ep.rank())
    return {name: difference(grad_of(weight), mine[name]) for name, weight in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_are_those_of_one_process(rank_threads: RankThreads, layout: Layout) -> None:
    """Measured: 9e-16."""
    for differences in rank_threads.run(off_by, layout.ranks, layout):
        assert len(differences) == 11
        assert max(differences.values()) <= TOLERANCE, differences


def adapters(rank: int) -> nn.ModuleDict:
    """Three of them: the first with a gradient on some ranks, the second on none, the third frozen."""
    model = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("some", "none", "frozen")})
    model["frozen"].requires_grad_(False)
    if rank % 2:
        weight = model["some"].weight
        assert isinstance(weight, nn.Parameter)
        weight.grad = torch.full_like(weight, float(rank))
    return model


def missing(rank: int) -> list[list[float] | None]:
    model = adapters(rank)
    sum_gradients(model, group=world())
    return [weight.grad if weight.grad is None else weight.grad.flatten().tolist() for weight in model.parameters()]


def test_a_missing_gradient_is_zero_where_a_peer_has_one_and_stays_missing_elsewhere(
    rank_threads: RankThreads,
) -> None:
    assert rank_threads.run(missing, 4) == [[[4.0, 4.0], None, None]] * 4


def missing_of_experts(rank: int) -> list[float | None]:
    """The experts of ranks 0 and 2 are the same, as those of 1 and 3; only rank 2 has a gradient."""
    layout = LAYOUTS[0]
    mesh = layout.mesh()
    model = layout.part(mesh.expert.get_group("ep"))
    if rank == 2:
        for weight in model.moe.get_submodule("experts").parameters():
            weight.grad = torch.ones_like(weight)
    sum_gradients(model, group=world(), expert_group=mesh.expert.get_group("edp"))
    return [weight.grad if weight.grad is None else weight.grad.mean().item() for weight in model.parameters()]


def test_ranks_with_the_same_experts_agree_about_missing_gradients(rank_threads: RankThreads) -> None:
    with_gradient = [None] * 3 + [1.0] * 3 + [None] * 5
    assert rank_threads.run(missing_of_experts, 4) == [with_gradient, [None] * 11] * 2


def collectives(rank: int, drop_one: bool) -> list[str]:
    """Of 40 gradients, all in two dtypes on the wire."""
    model = nn.ModuleList(nn.Linear(3, 3) for _ in range(20))
    model[7].double()
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    if drop_one and rank == 1:
        next(model.parameters()).grad = None
    with counting() as counts:
        sum_gradients(model, group=world())
    assert all(grad_of(weight).eq(2).all() for weight in model[1:].parameters())
    assert grad_of(next(model.parameters())).eq(1 if drop_one else 2).all()
    return counts.collectives


def test_gradients_travel_together(rank_pool: RankPool) -> None:
    """A check, and one sum per dtype; where ranks miss different gradients, first a maximum of bytes."""
    exchange, total = "c10d::alltoall_base_", "c10d::allreduce_"
    assert rank_pool.run(collectives, 2, False) == [[exchange, total, total]] * 2
    assert rank_pool.run(collectives, 2, True) == [[exchange, total, total, total]] * 2


def in_low_precision(rank: int) -> float:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    weight.grad = torch.full_like(weight, (256.0, 1.0, 1.0, 1.0)[rank])
    sum_gradients(nn.ParameterList([weight]), group=world())
    assert grad_of(weight).dtype == torch.bfloat16
    return grad_of(weight)[0].item()


def test_sums_in_low_precision_are_rounded_once(rank_threads: RankThreads) -> None:
    """256 + 1 is 256 in bfloat16, three times over; 259 rounds to 260."""
    assert rank_threads.run(in_low_precision, 4) == [260.0] * 4


def test_buckets_hold_one_dtype_and_a_bounded_number_of_bytes() -> None:
    """Float32 but for two; a gradient of 4 MiB on the wire is alone."""
    small = ALONE_BYTES // 8
    sizes = [(small, torch.bfloat16), (3, torch.float64), (2 * small, torch.float32)]
    sizes += [(small, torch.float32)] * (BUCKET_BYTES // ALONE_BYTES * 2) + [(2 * small, torch.bfloat16)]
    found = list(buckets([torch.empty(size, dtype=dtype, device="meta") for size, dtype in sizes]))
    full = BUCKET_BYTES // ALONE_BYTES * 2
    assert [[len(x) for x in bucket] for bucket in found] == [[2 * small], [small] * full, [2 * small], [small], [3]]


def one_large(rank: int) -> float:
    """The last number of a large gradient."""
    weight = nn.Parameter(torch.zeros(ALONE_BYTES // 4))
    weight.grad = torch.ones_like(weight)
    sum_gradients(nn.ParameterList([weight]), group=world())
    return weight.grad[-1].item()


def test_a_large_gradient_is_summed_where_it_lies(rank_threads: RankThreads) -> None:
    # Around all ranks: threads that patch for themselves put back each other's patch.
    with patch.object(torch, "cat", side_effect=AssertionError("copied")):
        assert rank_threads.run(one_large, 2) == [2.0] * 2
