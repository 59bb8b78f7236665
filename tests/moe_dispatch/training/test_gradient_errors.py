"""sum_gradients: what ranks have wrong is one error on all of them, before any gradient moves."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_dispatch import leave_experts_to_ranks, sum_gradients
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.training import LAYOUTS
from tests.support.ranks import refusal, world

ALIKE = (
    "; build the model alike on all ranks, freeze the same parameters, and put experts over the ranks that hold the "
    'same ones (build_mesh(...).expert["edp"])'
)


def differing(rank: int, what: str) -> str:
    """Rank 1 has another model than the others."""
    other = rank == 1
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 3 if other and what == "shape" else 4)})
    if other and what == "names":
        model["c"] = nn.Linear(1, 1)
    if other and what == "frozen":
        model["a"].requires_grad_(False)
    if other and what == "dtype":
        model["b"].bfloat16()
    if other and what == "sparse":
        model["e"] = nn.Embedding(3, 2, sparse=True)
        model["e"](torch.tensor([1])).sum().backward()
    return refusal(lambda: sum_gradients(model, group=world()))


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (
            "shape",
            "b.weight is not the same on all ranks (ranks [0, 2]: (4, 2) of torch.float32, trained; rank [1]: (3, 2) "
            "of torch.float32, trained), and 1 more like it" + ALIKE,
        ),
        (
            "names",
            "c.weight is not the same on all ranks (ranks [0, 2]: no such name; rank [1]: (1, 1) of torch.float32, "
            "trained), and 1 more like it" + ALIKE,
        ),
        (
            "frozen",
            "a.weight is not the same on all ranks (ranks [0, 2]: (2, 2) of torch.float32, trained; rank [1]: (2, 2) "
            "of torch.float32, frozen), and 1 more like it" + ALIKE,
        ),
        (
            "dtype",
            "b.weight is not the same on all ranks (ranks [0, 2]: (4, 2) of torch.float32, trained; rank [1]: (4, 2) "
            "of torch.bfloat16, trained), and 1 more like it" + ALIKE,
        ),
        (
            "sparse",
            "rank 1: e.weight has a sparse gradient; only dense ones are summed: use nn.Embedding(sparse=False)",
        ),
    ],
)
def test_models_that_differ_are_one_error(rank_threads: RankThreads, what: str, text: str) -> None:
    assert rank_threads.run(differing, 3, what) == [text] * 3


def of_experts(rank: int) -> str:
    """The experts of ranks 0 and 2 should be alike."""
    layout = LAYOUTS[0]
    mesh = layout.mesh()
    model = layout.part(mesh.expert.get_group("ep"))
    if rank == 2:
        model.moe.get_submodule("experts").requires_grad_(False)
    return refusal(lambda: sum_gradients(model, group=world(), expert_group=mesh.expert.get_group("edp")))


def test_copies_of_experts_that_differ_are_told_to_all_ranks(rank_threads: RankThreads) -> None:
    text = (
        "moe.experts.gate_eDF is not the same on all ranks (rank [0]: (3, 8, 12) of torch.float64, trained, experts "
        "0 to 2; rank [2]: (3, 8, 12) of torch.float64, frozen, experts 0 to 2), and 2 more like it" + ALIKE
    )
    assert rank_threads.run(of_experts, 4) == [text] * 4


def without_copies(rank: int) -> str:
    """Rank 3 forgets the ranks that hold the same experts."""
    mesh = LAYOUTS[0].mesh()
    model = LAYOUTS[0].part(mesh.expert.get_group("ep"))
    edp = None if rank == 3 else mesh.expert.get_group("edp")
    return refusal(lambda: sum_gradients(model, group=world(), expert_group=edp))


def test_copies_of_experts_that_nobody_would_sum_are_refused(rank_threads: RankThreads) -> None:
    text = (
        "rank 3: moe.experts.gate_eDF is in a layer over 2 ranks, and its gradient would be summed over 1 rank with "
        "the same experts, but there are 4 ranks; their product has to be that number: pass expert_group, the ranks "
        'that hold the same experts (build_mesh(...).expert.get_group("edp"))'
    )
    assert rank_threads.run(without_copies, 4) == [text] * 4


def test_a_group_is_passed_explicitly() -> None:
    with pytest.raises(ValueError, match=re.escape("group is 3; pass the process group explicitly")):
        sum_gradients(nn.Linear(2, 2), group=3)  # type: ignore[arg-type]


# ---- wrappers that reduce by themselves ------------------------------------------------------------------


def wrapped(rank: int, wrapper: str) -> str:
    layout = LAYOUTS[0]
    mesh = layout.mesh()
    model: nn.Module = layout.part(mesh.expert.get_group("ep"))
    ranks, pairs = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    if wrapper == "ddp":
        leave_experts_to_ranks(model)
        model = DistributedDataParallel(model)
    elif wrapper == "averages":
        fully_shard(model.get_submodule("last"), mesh=ranks)
    elif wrapper == "small mesh":
        last = fully_shard(model.get_submodule("last"), mesh=pairs["b"])
        assert isinstance(last, FSDPModule)
        last.set_gradient_divide_factor(1.0)
    return refusal(lambda: sum_gradients(model, group=world(), expert_group=mesh.expert.get_group("edp")))


def test_what_ddp_has_reduced_is_not_summed_again(rank_pool: RankPool) -> None:
    for text in rank_pool.run(wrapped, 4, "ddp"):
        assert "rank 3: DistributedDataParallel around the model reduces its gradients by itself" in text


def test_fsdp_that_averages_is_refused(rank_pool: RankPool) -> None:
    for text in rank_pool.run(wrapped, 4, "averages"):
        assert text.startswith("rank 0: FSDP2 around last averages gradients, and all others are sums; call ")


def test_a_mesh_that_leaves_ranks_out_is_refused(rank_pool: RankPool) -> None:
    for text in rank_pool.run(wrapped, 4, "small mesh"):
        assert "rank 1: last.weight is a DTensor whose mesh leaves out the ranks [2, 3], so its gradient" in text


def of_experts_under_ddp(rank: int) -> float:
    """Experts by themselves are what a group holds alike."""
    mesh = LAYOUTS[0].mesh()
    model = LAYOUTS[0].part(mesh.expert.get_group("ep"))
    experts = model.moe.get_submodule("experts")
    for weight in experts.parameters():
        weight.grad = torch.full_like(weight, rank + 1.0)
    edp = mesh.expert.get_group("edp")
    sum_gradients(experts, group=edp)
    gradient = next(experts.parameters()).grad
    assert gradient is not None
    assert dist.get_process_group_ranks(edp) == [rank % 2, rank % 2 + 2]
    return gradient.mean().item()


def test_experts_by_themselves_are_summed_over_their_copies(rank_threads: RankThreads) -> None:
    assert rank_threads.run(of_experts_under_ddp, 4) == [4.0, 6.0, 4.0, 6.0]
