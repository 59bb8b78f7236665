"""Sums and the norm where FSDP2 and tensor parallelism hold some of the parameters: still those of one process."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from moe_dispatch import clip_grad_norm, sum_gradients
from moe_dispatch.testing import RankPool
from tests.support.dispatch.training import LAYOUTS, Layout, Model
from tests.support.ranks import refusal, world
from tests.support.tensors import TOLERANCE, difference, grad_of


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """By FSDP2, which sums, and cannot reduce gradients without elements."""
    empty = {weight for weight in module.parameters() if not weight.numel()}
    sharded = fully_shard(module, mesh=mesh, ignored_params=empty)
    assert isinstance(sharded, FSDPModule)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def off_by(rank: int, layout: Layout, what: tuple[str, ...], norm_type: float) -> dict[str, float]:
    """How far clipped gradients and the norm are from those of one process, with FSDP2 around some modules."""
    reference = layout.whole()
    wanted = layout.backward_whole(reference)
    wanted_norm = nn.utils.clip_grad_norm_(reference.parameters(), 1.5, norm_type)
    mesh = layout.mesh()
    ep, edp = mesh.expert.get_group("ep"), mesh.expert.get_group("edp")
    model = layout.part(ep)
    copies = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    meshes = {"all": init_device_mesh("cpu", (4,)), "copies": copies, "edp": mesh.expert["edp"]}
    for name in what:
        place, _, of_ranks = name.partition(" over ")
        if place != "moe.experts" or layout.experts[ep.rank()]:
            shard(model.get_submodule(place), meshes[of_ranks])
    layout.backward(model, rank, mesh.ep_ranks)
    with_fsdp = "moe.experts over edp" in what
    sum_gradients(model, group=world(), **({} if with_fsdp else {"expert_group": edp}))
    norm = clip_grad_norm(model, 1.5, norm_type=norm_type)
    mine = layout.cut(wanted, ep.rank())
    found = {name: difference(whole(grad_of(weight)), mine[name]) for name, weight in model.named_parameters()}
    return {**found, "norm": difference(norm, wanted_norm)}


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize(
    ("layout", "what"),
    [
        (LAYOUTS[0], ("first over all", "last over copies")),
        (LAYOUTS[0], ("moe.experts over edp", "moe.router over copies", "moe.shared over all")),
        (LAYOUTS[1], ("moe.experts over edp", "last over all")),
        (LAYOUTS[0], ("moe.experts over edp", " over all")),
        (LAYOUTS[1], ("moe.experts over edp", " over all")),
    ],
    ids=str,
)
def test_gradients_and_norm_are_those_of_one_process(
    rank_pool: RankPool, layout: Layout, what: tuple[str, ...], norm_type: float
) -> None:
    """Measured: 6e-16."""
    for differences in rank_pool.run(off_by, 4, layout, what, norm_type):
        assert len(differences) == 12
        assert max(differences.values()) <= TOLERANCE, differences


def in_parts(rank: int) -> tuple[float, float]:
    """A gradient of which each of 2 ranks has a part of the sum: 1 and 2."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(DTensor.from_local(torch.zeros(4), mesh, [Replicate()]))
    weight.grad = DTensor.from_local(torch.full((4,), rank + 1.0), mesh, [Partial()])
    norm = clip_grad_norm(nn.ParameterList([weight]), 3.0)
    return norm.item(), whole(grad_of(weight)).mean().item()


def test_a_gradient_in_parts_has_the_norm_of_their_sum(rank_pool: RankPool) -> None:
    for norm, mean in rank_pool.run(in_parts, 2):
        assert (norm, mean) == (6.0, pytest.approx(1.5, rel=1e-6))


def sharded_twice(rank: int) -> tuple[str, float, float]:
    """Rows of one weight over both dimensions of a mesh: tensor parallelism, then FSDP2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    linear = nn.Linear(3, 6, bias=False)
    wanted = linear.weight.norm().item()
    parallelize_module(linear, mesh["tp"], ColwiseParallel())
    shard(linear, mesh["dp"])
    linear.weight.grad = linear.weight.detach().clone()
    assert isinstance(linear.weight, DTensor)
    return str(linear.weight.placements), clip_grad_norm(linear, 1.0).item(), wanted


def test_a_gradient_sharded_over_two_dimensions_counts_once(rank_pool: RankPool) -> None:
    for placements, norm, wanted in rank_pool.run(sharded_twice, 4):
        assert "_StridedShard" in placements
        assert norm == pytest.approx(wanted, rel=1e-6)


def with_fsdp1(rank: int) -> tuple[str, str]:
    model = nn.Sequential(nn.Linear(2, 2), FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")))
    return refusal(lambda: clip_grad_norm(model, 1.0)), refusal(lambda: sum_gradients(model, group=world()))


def test_fsdp1_is_refused_as_its_pieces_look_like_whole_parameters(rank_pool: RankPool) -> None:
    clip = (
        "FullyShardedDataParallel around 1 holds pieces of parameters as ordinary tensors, of which nobody can tell "
        "that they are pieces; use FSDP2 (fully_shard)"
    )
    for of_clip, of_sums in rank_pool.run(with_fsdp1, 2):
        assert of_clip == clip
        assert of_sums.startswith("rank 0: FullyShardedDataParallel around 1 reduces its gradients by itself, and ")


def torch_alone(rank: int) -> str:
    model: Model = LAYOUTS[0].part(LAYOUTS[0].mesh().expert.get_group("ep"))
    shard(model.get_submodule("last"), init_device_mesh("cpu", (4,)))
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError) as error:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    dist.barrier()
    return str(error.value)


def test_torch_alone_refuses_such_a_model(rank_pool: RankPool) -> None:
    """Why there is clip_grad_norm. If this fails, torch has learned it."""
    assert all("mixed torch.Tensor and DTensor" in text for text in rank_pool.run(torch_alone, 4))
