"""split_experts: a checkpoint of torch.distributed.checkpoint that any number of ranks loads, and trains on from."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moe_dispatch import ParallelMesh, split_experts, sum_gradients, whole_state_dict
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.training import Layout, Model
from tests.support.ranks import refusal, world
from tests.support.tensors import TOLERANCE, difference

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
UNEVEN = Layout(seq=(3, 0, 2, 1), experts=(3, 1, 0, 4))
EVEN = Layout(seq=(1, 1, 2, 2), experts=(2, 2, 2, 2))
COPIES = Layout(seq=(2, 2, 1, 1), experts=(5, 3))  # over 2 x 2 ranks
ONE = Layout(seq=(6,), experts=(8,))


def new_group_of_one(rank: int) -> dist.ProcessGroup:
    group = [dist.new_group([i]) for i in range(dist.get_world_size())][rank]
    assert isinstance(group, dist.ProcessGroup)
    return group


def names(rank: int) -> list[str]:
    """Of this rank's experts of one tensor."""
    model = UNEVEN.part(world())
    split = split_experts(model.state_dict(), model)
    assert split["first.weight"].shape == (8, 8)
    for name in (name for name in split if "gate_eDF" in name):
        assert split[name].shape == (8, 12)
    return [name for name in split if "gate_eDF" in name]


def test_experts_have_the_numbers_of_all_ranks_together(rank_threads: RankThreads) -> None:
    numbers = [[0, 1, 2], [3], [], [4, 5, 6, 7]]
    assert rank_threads.run(names, 4) == [[f"moe.experts.gate_eDF.{i}" for i in mine] for mine in numbers]


# ---- from one number of ranks to another -----------------------------------------------------------------


def build(layout: Layout, how: str) -> tuple[Model, ParallelMesh]:
    """With the numbers of the layout's seed."""
    mesh = layout.mesh()
    model = layout.part(mesh.expert.get_group("ep"))
    if how:
        place = {"over experts": 0, "within experts": 1}[how]
        fully_shard(
            model.moe.get_submodule("experts"),
            mesh=mesh.expert["edp"],
            shard_placement_fn=lambda weight: Shard(place),
        )
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(1.0)  # pyright: ignore[reportCallIssue]
                module.set_force_sum_reduction_for_comms(True)  # pyright: ignore[reportCallIssue]
    return model, mesh


def step(layout: Layout, model: Model, optimizer: torch.optim.Optimizer, mesh: ParallelMesh, rank: int) -> None:
    layout.backward(model, rank, mesh.ep_ranks)
    on_mesh = isinstance(next(model.moe.get_submodule("experts").parameters()), DTensor)
    edp = {} if on_mesh else {"expert_group": mesh.expert.get_group("edp")}
    sum_gradients(model, group=world(), **edp)
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, foreach=False)


def train_and_save(rank: int, layout: Layout, how: str, path: Path) -> None:
    """One step."""
    model, mesh = build(layout, how)
    optimizer = optimizer_of(model)
    step(layout, model, optimizer, mesh, rank)
    state = split_experts(model.state_dict(), model)
    state |= split_experts(get_optimizer_state_dict(model, optimizer, options=FLAT), model)
    save(state, checkpoint_id=path)


def load_and_train(rank: int, layout: Layout, how: str, path: Path) -> dict[str, Tensor]:
    """A second step, with a model and an optimizer that had other numbers; then the whole model."""
    model, mesh = build(Layout(seq=layout.seq, experts=layout.experts, seed=7), how)
    optimizer = optimizer_of(model, lr=0.5)
    flat = get_optimizer_state_dict(model, optimizer, options=FLAT)
    of_optimizer = split_experts(flat, model)
    state = split_experts(model.state_dict(), model) | of_optimizer
    load(state, checkpoint_id=path)
    loaded: dict[str, Any] = {name: state.get(name, value) for name, value in flat.items()}
    set_optimizer_state_dict(model, optimizer, loaded, options=FLAT)
    step(layout, model, optimizer, mesh, rank)
    return whole_state_dict(model)


def two_steps_of_one_process() -> dict[str, Tensor]:
    model = ONE.whole()
    optimizer = optimizer_of(model)
    for _ in range(2):
        ONE.backward_whole(model)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize(
    ("before", "how_before", "after", "how_after"),
    [
        (UNEVEN, "", EVEN, ""),
        (UNEVEN, "", ONE, ""),
        (ONE, "", UNEVEN, ""),
        (COPIES, "", UNEVEN, ""),
        (EVEN, "", COPIES, "over experts"),
        (COPIES, "over experts", EVEN, ""),
        (COPIES, "within experts", COPIES, "within experts"),
    ],
    ids=lambda value: f"{getattr(value, 'experts', value)}",
)
def test_a_checkpoint_goes_on_under_any_partition(
    rank_pool: RankPool, tmp_path: Path, before: Layout, how_before: str, after: Layout, how_after: str
) -> None:
    """Model and optimizer. Measured: 4e-16."""
    rank_pool.run(train_and_save, before.ranks, before, how_before, tmp_path)
    wanted = two_steps_of_one_process()
    for whole in rank_pool.run(load_and_train, after.ranks, after, how_after, tmp_path):
        assert whole.keys() == wanted.keys()
        differences = {name: difference(whole[name], wanted[name]) for name in wanted}
        assert max(differences.values()) <= TOLERANCE, differences


# ---- what cannot be split ----------------------------------------------------------------------------------


def cut_in_two_ways(rank: int) -> str:
    """Over experts and within them."""
    model = ONE.part(new_group_of_one(rank))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    experts = model.moe.get_submodule("experts")
    gate_eDF = distribute_tensor(torch.zeros(8, 8, 12), mesh, [Shard(0), Shard(2)])
    experts.register_parameter("gate_eDF", nn.Parameter(gate_eDF))
    return refusal(lambda: split_experts(model.state_dict(), model))


def test_experts_on_a_mesh_in_two_ways_are_refused(rank_pool: RankPool) -> None:
    text = (
        "moe.experts.gate_eDF has placements (Shard(dim=0), Shard(dim=2)); experts can be sharded in dimension 0 "
        "over one dimension of the mesh, or in other dimensions, not both"
    )
    assert rank_pool.run(cut_in_two_ways, 4) == [text] * 4


def not_stacked(rank: int) -> str:
    model = UNEVEN.part(world())
    model.moe.get_submodule("experts").register_buffer("scale", torch.tensor(1.0))
    return refusal(lambda: split_experts(model.state_dict(), model))


def test_experts_that_are_not_stacked_are_refused(rank_threads: RankThreads) -> None:
    for rank, text in enumerate(rank_threads.run(not_stacked, 4)):
        assert text.startswith(f"moe.experts.scale is () in a layer with {UNEVEN.experts[rank]} experts on this rank")
