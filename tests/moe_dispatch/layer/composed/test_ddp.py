"""MoE in a model under DistributedDataParallel: experts stay those of their rank, or every rank refuses."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from moe_dispatch import GroupedExperts, MoE, Partition, TokenSharding, TopKRouter, leave_experts_to_ranks
from moe_dispatch.testing import RankPool
from tests.support.ranks import refusal, world
from tests.support.tensors import TOLERANCE, difference, grad_of

SHARDING = TokenSharding(batch=2, seq=Partition((3, 2)))


class Model(nn.Module):
    def __init__(self, experts: Partition, group: dist.ProcessGroup) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(8, 8)
        router = TopKRouter(8, experts.total, 2, score="softmax")
        torch.manual_seed(2 + group.rank())  # other experts on each rank
        mine = GroupedExperts(experts.sizes[group.rank()], 8, 12)
        self.moe = MoE(router=router, experts=mine, partition=experts, group=group)

    def forward(self, x_BlD: Tensor) -> Tensor:
        return self.moe(self.first(x_BlD), sharding=SHARDING)[0]


def summed(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def off_by(rank: int, sizes: tuple[int, ...]) -> dict[str, float]:
    """How far outputs and gradients are from those without DDP, whose gradients are summed by hand."""
    model = Model(Partition(sizes), world()).double()
    plain = copy.deepcopy(model)
    leave_experts_to_ranks(model)
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(world(), summed)
    x_BlD = SHARDING.shard(torch.randn(2, 5, 8, dtype=torch.float64), rank)
    outs = [run(x_BlD) for run in (plain, wrapped)]
    for out in outs:
        out.square().sum().backward()
    differences = {"out": difference(outs[1], outs[0])}
    for (name, wanted), (_, got) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        if "experts" not in name:
            dist.all_reduce(grad_of(wanted))
        differences[name] = difference(grad_of(got), grad_of(wanted))
    differences["load"] = float((model.moe.load_E - plain.moe.load_E).abs().sum())
    return differences


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1), (4, 0)])
def test_experts_left_to_their_ranks_train_as_without_ddp(rank_pool: RankPool, sizes: tuple[int, ...]) -> None:
    for differences in rank_pool.run(off_by, 2, sizes):
        assert max(differences.values()) <= TOLERANCE, differences


def refused(rank: int, length_of_rank_1: int) -> str:
    model = DistributedDataParallel(Model(Partition((2, 2)), world()))
    return refusal(lambda: model(torch.ones(2, (3, length_of_rank_1)[rank], 8)))


@pytest.mark.parametrize("length_of_rank_1", [2, 4])
def test_averaged_experts_are_refused_on_every_rank(rank_pool: RankPool, length_of_rank_1: int) -> None:
    """Also where one rank has a shard of the wrong length, of which it would tell its peers in a collective."""
    text = (
        "DistributedDataParallel has given the experts of one rank to all of the ranks [0, 1], and would average "
        "their gradients; each rank of an expert-parallel group has experts of its own: call "
        "leave_experts_to_ranks(model) before DistributedDataParallel(model)"
    )
    assert rank_pool.run(refused, 2, length_of_rank_1) == [text] * 2


def over_copies(rank: int) -> bool:
    """Ranks 0 and 1 hold the same experts, each in a group of its own: DDP over them is what they need."""
    own = [dist.new_group([0]), dist.new_group([1])][rank]
    assert isinstance(own, dist.ProcessGroup)
    model = Model(Partition((4,)), own)
    own_sharding = TokenSharding(batch=2, seq=3)
    model.forward = lambda x: model.moe(model.first(x), sharding=own_sharding)[0]  # type: ignore[method-assign]
    DistributedDataParallel(model)(torch.randn(2, 3, 8)).sum().backward()
    whole = grad_of(model.moe.experts.gate_eDF).clone()
    dist.all_reduce(whole)
    return torch.equal(whole / 2, grad_of(model.moe.experts.gate_eDF))


def test_copies_of_the_same_experts_may_be_averaged(rank_pool: RankPool) -> None:
    assert rank_pool.run(over_copies, 2) == [True, True]


def ignored(rank: int) -> list[str]:
    model = nn.Sequential(nn.Linear(8, 8), Model(Partition((2, 2)), world()))
    model._ddp_params_and_buffers_to_ignore = ["0.bias"]  # type: ignore[assignment]
    leave_experts_to_ranks(model)
    return sorted(model._ddp_params_and_buffers_to_ignore)  # type: ignore[arg-type]


def test_what_was_ignored_before_stays_ignored(rank_pool: RankPool) -> None:
    names = ["0.bias", *(f"1.moe.{name}" for name in ("experts.down_eFD", "experts.gate_eDF", "experts.up_eDF"))]
    assert rank_pool.run(ignored, 2) == [[*names, "1.moe.load_E", "1.moe.report"]] * 2


def joined(rank: int, throw: bool) -> str:
    """Rank 1 has a batch more than rank 0."""
    model = Model(Partition((2, 2)), world())
    leave_experts_to_ranks(model)
    wrapped = DistributedDataParallel(model)
    x_BlD = SHARDING.shard(torch.ones(2, 5, 8), rank)
    try:
        with wrapped.join(throw_on_early_termination=throw):
            for _ in range(1 + rank):
                wrapped(x_BlD).sum().backward()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def test_a_join_that_goes_on_without_some_ranks_is_refused(rank_pool: RankPool) -> None:
    """It hung: the rank with a batch more waited for the other one's rows."""
    text = (
        "DistributedDataParallel.join() goes on without the ranks that have no batch left, but an exchange needs "
        "every rank of its group; call the model on all ranks, with a sharding that gives those 0 tokens, or use "
        "join(throw_on_early_termination=True)"
    )
    assert rank_pool.run(joined, 2, False) == [text] * 2


def test_a_join_that_ends_all_ranks_together_ends_them(rank_pool: RankPool) -> None:
    assert all("exhausted" in text for text in rank_pool.run(joined, 2, True))
