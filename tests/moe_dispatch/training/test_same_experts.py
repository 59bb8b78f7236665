"""Ranks whose experts are summed or sharded together hold the same ones, or every rank is told.

In a mesh whose ranks are not in ascending order, a rank's coordinate is not its number in the process group, which
tells it its experts. So a column of the mesh may hold the experts of several places.
"""

import pytest
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from moe_dispatch import MoE, check_replicated, sum_gradients
from moe_dispatch.testing import RankPool
from tests.support.dispatch.training import Layout, Model
from tests.support.ranks import refusal, world
from tests.support.tensors import TOLERANCE, difference, grad_of

# Two experts on each rank: nothing differs but which they are.
LAYOUT = Layout(seq=(3, 0, 2, 1), experts=(2, 2))
ASCENDING, PERMUTED = [[0, 1], [2, 3]], [[3, 1], [0, 2]]


def on_mesh(ranks: list[list[int]], with_fsdp: bool) -> tuple[DeviceMesh, Model]:
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("edp", "ep"))
    model = LAYOUT.part(mesh.get_group("ep"))
    if with_fsdp:
        experts = fully_shard(model.moe.get_submodule("experts"), mesh=mesh["edp"])
        assert isinstance(experts, FSDPModule)
        experts.set_gradient_divide_factor(1.0)
        experts.set_force_sum_reduction_for_comms(True)
    return mesh, model


def told(rank: int, ranks: list[list[int]], with_fsdp: bool, checked: str) -> str:
    mesh, model = on_mesh(ranks, with_fsdp)
    if checked == "check_replicated":
        return refusal(lambda: check_replicated(model, group=world()))
    edp = None if with_fsdp else mesh.get_group("edp")
    return refusal(lambda: sum_gradients(model, group=world(), expert_group=edp))


@pytest.mark.parametrize(
    ("checked", "with_fsdp"), [("sum_gradients", False), ("sum_gradients", True), ("check_replicated", True)]
)
def test_a_column_that_holds_other_experts_is_told_to_every_rank(
    rank_pool: RankPool, checked: str, with_fsdp: bool
) -> None:
    """Rank 0 has the first experts of its row, and rank 3, in its column, the last of its own."""
    text = (
        "moe.experts.gate_eDF is not the same on all ranks (rank [0]: (2, 8, 12) of torch.float64, trained, experts "
        "0 to 1; rank [3]: (2, 8, 12) of torch.float64, trained, experts 2 to 3), and 5 more like it; "
    )
    texts = rank_pool.run(told, 4, PERMUTED, with_fsdp, checked)
    assert texts == texts[:1] * 4
    assert texts[0].startswith(text)


def right(rank: int, with_fsdp: bool) -> float:
    mesh, model = on_mesh(ASCENDING, with_fsdp)
    check_replicated(model, group=world())
    LAYOUT.backward(model, rank, ((0, 1), (2, 3))[rank // 2])
    sum_gradients(model, group=world(), expert_group=None if with_fsdp else mesh.get_group("edp"))
    wanted = LAYOUT.cut(LAYOUT.backward_whole(LAYOUT.whole()), mesh.get_group("ep").rank())
    grads = {name: grad_of(weight) for name, weight in model.named_parameters()}
    return max(
        difference(grad.full_tensor() if isinstance(grad, DTensor) else grad, wanted[name])
        for name, grad in grads.items()
    )


@pytest.mark.parametrize("with_fsdp", [False, True])
def test_columns_of_the_same_experts_are_summed(rank_pool: RankPool, with_fsdp: bool) -> None:
    assert max(rank_pool.run(right, 4, with_fsdp)) <= TOLERANCE


def of_two_layers(rank: int) -> float:
    """A second layer, whose experts lie over all ranks, beside a layer whose experts FSDP2 shards over columns."""
    _, model = on_mesh(ASCENDING, True)
    other = Layout(seq=LAYOUT.seq, experts=(1, 1, 1, 1)).part(world()).moe
    assert isinstance(other, MoE)
    check_replicated(nn.ModuleList([model, other]), group=world())
    return 0.0


def test_layers_over_other_ranks_are_left_out(rank_pool: RankPool) -> None:
    assert rank_pool.run(of_two_layers, 4) == [0.0] * 4
