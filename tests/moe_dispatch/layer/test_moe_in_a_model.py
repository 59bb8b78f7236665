"""The MoE layer beside another one, under FSDP, under autocast, and with its gradients clipped."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dispatch import Partition, TokenSharding, build_mesh
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.checkpoints import Run, plainly, recomputed
from tests.support.dispatch.moe import (
    CASES,
    Case,
    Outcome,
    assert_close,
    assert_like_one_process,
    gradients_of,
    one_process,
    outcome,
    pull,
)

TWO = (
    Case(seq=(3, 2), experts=(2, 2), groups=2, limited_groups=1, judged_by=1, score="softmax"),
    Case(seq=(0, 4), experts=(1, 5), top_k=3, order="LB", batch=(3,), seed=7),
)


def two_layers(rank: int, run: Run, backward: tuple[int, int]) -> list[Outcome]:
    """Two unlike layers, forward one after the other, backward in the given order."""
    layers, shards = [case.layer(rank) for case in TWO], [case.shards(rank) for case in TWO]
    results = [run(moe, shard[0], case.sharding) for moe, shard, case in zip(layers, shards, TWO, strict=True)]
    for index in backward:
        pull(results[index], *shards[index][1:]).backward()
    return [outcome(layers[i], shards[i][0], results[i]) for i in range(2)]


@pytest.mark.parametrize("run", [plainly, recomputed])
@pytest.mark.parametrize("backward", [(0, 1), (1, 0)])
def test_unlike_layers_in_one_process_do_not_meet(
    run: Run, backward: tuple[int, int], rank_threads: RankThreads
) -> None:
    for case, *outcomes in zip(TWO, *rank_threads.run(two_layers, 2, run, backward), strict=True):
        assert_like_one_process(case, outcomes)


def global_norm(rank: int, case: Case) -> tuple[float, float]:
    """The norm of all gradients: those of replicated parameters summed first; each expert counted where it lives."""
    moe, (x_BlD, pull_BlD, pull_BlE) = case.layer(rank), case.shards(rank)
    pull(moe(x_BlD, sharding=case.sharding), pull_BlD, pull_BlE).backward()
    square, square_of_experts = torch.zeros((), dtype=case.dtype), torch.zeros((), dtype=case.dtype)
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None
        if name.startswith("experts."):
            square_of_experts += parameter.grad.square().sum()
        else:
            dist.all_reduce(parameter.grad)
            square += parameter.grad.square().sum()
    dist.all_reduce(square_of_experts)
    return (square + square_of_experts).sqrt().item(), square_of_experts.item()


@pytest.mark.parametrize("case", [CASES[2], CASES[9], CASES[13]], ids=str)
def test_the_norm_of_the_gradients_is_that_of_one_process(case: Case, rank_threads: RankThreads) -> None:
    norms = rank_threads.run(global_norm, case.ranks, case)
    assert len(set(norms)) == 1
    gradients = one_process(case).gradients
    want = nn.utils.get_total_norm(gradients.values()).item()
    assert norms[0][0] == pytest.approx(want, rel=1e-12)
    assert norms[0][1] > 0


def run_sharded(rank: int, seq: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """Experts over ep = 2, and FSDP over the other two ranks: whole gradients of the experts of this ep row."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = build_mesh(dp=4, ep=2, device_type="cpu")
    group, sharding = mesh.expert.get_group("ep"), TokenSharding(batch=2, seq=Partition(seq))
    case = Case(seq=(2, 2), experts=(3, 2))
    moe = case.layer(group.rank(), group)
    fully_shard(moe.experts, mesh=mesh.expert["edp"])
    experts: nn.Module = moe.experts
    assert isinstance(experts, FSDPModule)
    experts.set_gradient_divide_factor(1.0)
    experts.set_force_sum_reduction_for_comms(True)
    whole_BLD, pull_BLD, pull_BLE = replace(case, seq=(sum(seq),)).inputs()
    x_BlD, pull_BlD, pull_BlE = (sharding.shard(whole, rank) for whole in (whole_BLD, pull_BLD, pull_BLE))
    x_BlD = x_BlD.clone().requires_grad_()
    pull(moe(x_BlD, sharding=sharding.select(mesh.ep_ranks)), pull_BlD, pull_BlE).backward()
    gradients = {
        name: gradient.full_tensor() if name.startswith("experts.") else gradient  # pyright: ignore[reportAttributeAccessIssue]
        for name, gradient in gradients_of(moe).items()
    }
    assert x_BlD.grad is not None
    return gradients, x_BlD.grad


@pytest.mark.parametrize("seq", [(2, 1, 3, 2), (3, 0, 0, 2), (0, 0, 4, 1)])
def test_experts_sharded_by_fsdp_have_the_gradients_of_one_process(seq: tuple[int, ...], rank_pool: RankPool) -> None:
    results = rank_pool.run(run_sharded, 4, seq)
    want = one_process(Case(seq=(sum(seq),), experts=(5,)))
    for name, gradient in want.gradients.items():
        parts = [found[name] for found, _ in results]
        if not name.startswith("experts."):
            assert_close(torch.stack(parts).sum(0), gradient, 1e-12, name)
            continue
        for row in (parts[:2], parts[2:]):  # ep rows 0 1 and 2 3, each with all experts
            assert_close(torch.cat(row), gradient, 1e-12, name)
    dx_BLD = TokenSharding(batch=2, seq=Partition(seq)).unshard([dx_BlD for _, dx_BlD in results])
    assert_close(dx_BLD, want.dx_BlD, 1e-12, "dx")


def in_autocast(rank: int, case: Case) -> tuple[torch.dtype, Tensor, Tensor]:
    """Dtype of the output, the output, and the gradient of the tokens."""
    moe, (x_BlD, _, _) = case.layer(rank), case.shards(rank)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_BlD, _ = moe(x_BlD, sharding=case.sharding)
    y_BlD.sum().backward()
    assert x_BlD.grad is not None
    return y_BlD.dtype, y_BlD.detach(), x_BlD.grad


@pytest.mark.parametrize("experts", [(4, 0), (0, 4), (2, 2)])
def test_autocast_gives_what_it_gives_without_ranks_without_experts(
    experts: tuple[int, ...], rank_pool: RankPool
) -> None:
    case, one = (Case(seq=(3, 2), experts=sizes, dtype=torch.float32) for sizes in (experts, (4,)))
    one = replace(one, seq=(5,))
    ((dtype, y_BLD, grad_BLD),) = rank_pool.run(in_autocast, 1, one)
    found = rank_pool.run(in_autocast, 2, case)
    assert {each[0] for each in found} == {dtype} == {torch.float32}
    assert_close(torch.cat([each[1] for each in found], 1), y_BLD, 1e-6, "y")  # measured: 0
    assert_close(torch.cat([each[2] for each in found], 1), grad_BLD, 1e-6, "dx")
