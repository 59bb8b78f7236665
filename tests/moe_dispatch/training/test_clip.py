"""clip_grad_norm: the norm and the gradients that torch has in one process with the whole model."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_dispatch import clip_grad_norm, sum_gradients
from moe_dispatch.testing import RankPool, RankThreads
from moe_dispatch.testing.counting import counting
from tests.support.dispatch.training import LAYOUTS, Layout, Model
from tests.support.ranks import refusal, world
from tests.support.tensors import TOLERANCE, difference, grad_of

SMALL = Layout(seq=(2, 1), experts=(1, 2))


def with_summed_gradients(rank: int, layout: Layout) -> tuple[Model, dist.ProcessGroup]:
    """This rank's model after backward, and the group of its experts."""
    mesh = layout.mesh()
    ep = mesh.expert.get_group("ep")
    model = layout.part(ep)
    layout.backward(model, rank, mesh.ep_ranks)
    sum_gradients(model, group=world(), expert_group=mesh.expert.get_group("edp"))
    return model, ep


def off_by(rank: int, layout: Layout, max_norm: float, norm_type: float) -> dict[str, float]:
    """How far the norm and each clipped gradient are from those of one process."""
    whole = layout.whole()
    wanted = layout.backward_whole(whole)
    wanted_norm = nn.utils.clip_grad_norm_(whole.parameters(), max_norm, norm_type)
    model, ep = with_summed_gradients(rank, layout)
    norm = clip_grad_norm(model, max_norm, norm_type=norm_type)
    mine = layout.cut(wanted, ep.rank())
    differences = {name: difference(grad_of(weight), mine[name]) for name, weight in model.named_parameters()}
    return {**differences, "norm": difference(norm, wanted_norm)}


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 3.0])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_norm_and_gradients_are_those_of_one_process(
    rank_threads: RankThreads, layout: Layout, norm_type: float
) -> None:
    """Measured: 6e-16."""
    for differences in rank_threads.run(off_by, layout.ranks, layout, 1.5, norm_type):
        assert len(differences) == 12
        assert max(differences.values()) <= TOLERANCE, differences


def test_small_gradients_stay_as_they_are(rank_threads: RankThreads) -> None:
    for differences in rank_threads.run(off_by, 4, LAYOUTS[0], 1e6, 2.0):
        assert max(differences.values()) <= TOLERANCE, differences


def not_finite(rank: int, value: float, norm_type: float) -> tuple[str, bool, float]:
    """One gradient of rank 1's experts is bad: the refusal, whether it left gradients alone, the norm."""
    model, _ = with_summed_gradients(rank, SMALL)
    if rank == 1:
        grad_of(next(model.moe.get_submodule("experts").parameters()))[0, 0, 0] = value
    before = grad_of(model.first.weight).clone()
    text = refusal(lambda: clip_grad_norm(model, 1.0, norm_type=norm_type, error_if_nonfinite=True))
    same = torch.equal(before, grad_of(model.first.weight))
    return text, same, clip_grad_norm(model, 1.0, norm_type=norm_type).item()


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_one_error_before_anything_is_scaled(
    rank_threads: RankThreads, value: float, norm_type: float
) -> None:
    wanted = (
        f"the gradients have norm {value}, and were left as they are; skip this step, or call without "
        "error_if_nonfinite to have them scaled all the same"
    )
    for text, same, norm in rank_threads.run(not_finite, 2, value, norm_type):
        assert (text, same) == (wanted, True)
        assert str(norm) == str(value)


def largest_with_nan(rank: int) -> float:
    """On gloo, whose maximum may lose a NaN that is on one rank only."""
    model, _ = with_summed_gradients(rank, SMALL)
    if rank == 1:
        grad_of(next(model.moe.get_submodule("experts").parameters()))[0, 0, 0] = math.nan
    return clip_grad_norm(model, 1.0, norm_type=math.inf).item()


def test_a_nan_of_one_rank_is_the_norm_of_all(rank_pool: RankPool) -> None:
    assert all(math.isnan(norm) for norm in rank_pool.run(largest_with_nan, 2))


def without_gradients(rank: int) -> tuple[float, Sequence[float]]:
    """Only the experts of rank 1 have some: 36 times 2. Rank 0 has none at all."""
    mesh = SMALL.mesh()
    model = SMALL.part(mesh.expert.get_group("ep"))
    if rank == 1:
        weight = next(model.moe.get_submodule("experts").parameters())
        weight.grad = torch.zeros_like(weight)
        weight.grad[0, :3] = 2.0
    norm = clip_grad_norm(model, 6.0)
    return norm.item(), [weight.grad.max().item() for weight in model.parameters() if weight.grad is not None]


def test_missing_gradients_count_as_zero_and_stay_missing(rank_threads: RankThreads) -> None:
    (norm, nothing), (same_norm, clipped) = rank_threads.run(without_gradients, 2)
    assert norm == same_norm == 12.0
    assert nothing == []
    assert clipped == pytest.approx([1.0], rel=1e-6)


def in_stages(rank: int) -> float:
    """Each rank is a stage of a pipeline."""
    stage = nn.Linear(1, 1, bias=False)
    stage.weight.grad = torch.full((1, 1), (3.0, 4.0)[rank])
    norm = clip_grad_norm(stage, 2.5, stage_group=world())
    assert grad_of(stage.weight).item() == pytest.approx((1.5, 2.0)[rank], rel=1e-6)
    return norm.item()


def test_stages_of_a_pipeline_have_one_norm(rank_threads: RankThreads) -> None:
    assert rank_threads.run(in_stages, 2) == [5.0, 5.0]


def with_tied_weights(rank: int, norm_type: float) -> tuple[float, float]:
    """Both stages hold one weight, the second counts only its own. The norm, and by how much all is off."""
    torch.manual_seed(rank)
    stage = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(2, 2, bias=False)])
    tied, own = (grad.double() for grad in (torch.arange(9.0).view(3, 3), torch.full((2, 2), rank + 20.0)))
    stage.double()
    for linear, grad in zip(stage.children(), (tied, own), strict=True):
        linear.get_parameter("weight").grad = grad.clone()
    elsewhere = [stage.get_parameter("0.weight")] * rank
    norm = clip_grad_norm(stage, 1.0, norm_type=norm_type, stage_group=world(), counted_elsewhere=elsewhere)
    grads = [grad_of(weight) for weight in stage.parameters()]
    return norm.item(), max(difference(grad, x / (norm + 1e-6)) for grad, x in zip(grads, (tied, own), strict=True))


@pytest.mark.parametrize("norm_type", [2.0, 3.0, math.inf])
def test_a_weight_of_two_stages_counts_once_and_is_scaled_in_both(
    rank_threads: RankThreads, norm_type: float
) -> None:
    whole = torch.cat([torch.arange(9.0), torch.full((4,), 20.0), torch.full((4,), 21.0)]).double()
    for norm, off in rank_threads.run(with_tied_weights, 2, norm_type):
        assert norm == pytest.approx(whole.norm(norm_type).item(), rel=1e-12)
        assert off <= TOLERANCE


def test_what_another_stage_counts_is_a_parameter_of_this_one() -> None:
    with pytest.raises(ValueError, match="counted_elsewhere has a parameter that is none of the model's"):
        clip_grad_norm(nn.Linear(2, 2), 1.0, counted_elsewhere=[nn.Parameter(torch.zeros(1))])


def test_the_norm_of_low_precision_is_float32_and_precise() -> None:
    """1000 times 1.0078125: its squares summed in bfloat16 would stop at 256."""
    weight = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    weight.grad = torch.full_like(weight, 1.0078125)
    norm = clip_grad_norm(nn.ParameterList([weight]), 1.0)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(1.0078125 * 1000**0.5, rel=1e-6)
    assert grad_of(weight).dtype == torch.bfloat16


def test_a_model_without_parameters_has_norm_0() -> None:
    assert clip_grad_norm(nn.Identity(), 1.0).item() == 0.0


@pytest.mark.parametrize("norm_type", [0.0, -1.0, math.nan])
def test_other_norms_are_refused(norm_type: float) -> None:
    with pytest.raises(ValueError, match=f"norm_type is {norm_type}; use 2.0, another number above 0, or math.inf"):
        clip_grad_norm(nn.Linear(2, 2), 1.0, norm_type=norm_type)


def cost(rank: int) -> tuple[list[str], list[str]]:
    """Collectives and waits of the host."""
    model, _ = with_summed_gradients(rank, SMALL)
    with counting() as counts:
        clip_grad_norm(model, 1.0)
    return counts.collectives, counts.host_syncs


def test_it_costs_one_sum_and_no_wait(rank_pool: RankPool) -> None:
    assert rank_pool.run(cost, 2) == [(["c10d::allreduce_"], [])] * 2
