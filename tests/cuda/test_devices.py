"""A tensor, list or mask of one rank that is elsewhere is the same error on every rank, and nobody waits for NCCL."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import (
    GroupedExperts,
    GroupError,
    MoE,
    TopKRouter,
    agree,
    gather_sharding,
    plan_dispatch,
    plan_hierarchical,
    plan_static,
)
from sp_attention import (
    Scheme,
    ShardedBatch,
    attention_over_ranks,
    count_targets,
    gather_outputs,
    latent_attention_over_ranks,
    mean_cross_entropy,
    mean_loss,
    shard_batch,
    ulysses_attention,
)
from tests.support.cuda.device import FakeGpu
from tests.support.cuda.ranks import Ended, ends_on_cuda
from tests.support.cuda.tried import of_attention, of_experts
from tests.support.latent import TURNED, WIDE, expand
from tests.support.ranks import world

RANKS, WRONG = 4, 1
AT_CPU = "on cpu, but the group communicates on cuda:0; move it there"
Spoil = Callable[[Any], Any]


def host(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype, device="cpu")


def as_list(x: Tensor) -> object:
    return host(x).tolist()


def keep(x: Tensor) -> Tensor:
    return x


def plan(ids: Spoil, weight: Spoil, rank: int, gpu: FakeGpu) -> object:
    given = of_experts.drawn(rank)
    ids_BlK, weight_BlK = gpu.tensor(given[0]), gpu.tensor(given[1].detach())
    return plan_dispatch(ids(ids_BlK), weight_BlK=weight(weight_BlK), group=world(), **terms())


def terms() -> dict[str, Any]:
    return {
        "dim": of_experts.DIM,
        "sharding": of_experts.tokens_of_ranks(),
        "experts": of_experts.experts_of_ranks(),
    }


def plan_of_nodes(ids: Spoil, rank: int, gpu: FakeGpu) -> object:
    nodes = of_experts.nodes_of(rank)
    return plan_hierarchical(ids(gpu.tensor(of_experts.drawn(rank)[0])), nodes=nodes, **terms())


def layer(spoil_x: Spoil, real: Spoil, ids: Spoil, planner: Callable[[int], Any], rank: int, gpu: FakeGpu) -> object:
    experts = of_experts.experts_of_ranks()
    moe = MoE(
        router=TopKRouter(of_experts.DIM, experts.total, of_experts.CHOICES, score="sigmoid"),
        experts=GroupedExperts(experts.sizes[rank], of_experts.DIM, of_experts.HIDDEN),
        partition=experts,
        group=world(),
        **planner(rank),
    )
    gpu.module(moe)
    ids_BlK, _, x = of_experts.drawn(rank)
    given = {"real_Bl": real(gpu.tensor(ids_BlK[..., 0] > 0)), "expert_BlK": ids(gpu.tensor(ids_BlK))}
    return moe(spoil_x(gpu.tensor(x.detach())), sharding=of_experts.tokens_of_ranks(), **given)


def batch(change: Callable[[Any], Any], rank: int, gpu: FakeGpu) -> object:
    whole = of_attention.batch_of(gpu, padded=True)
    return shard_batch(change(whole), sharding=of_attention.tokens_of_ranks(), group=world())


def loss(call: Callable[..., Any], x: Spoil, target: Spoil, rank: int, gpu: FakeGpu) -> object:
    shape = of_attention.tokens_of_ranks().local_shape(rank)
    target_Bl = target(torch.zeros(shape, dtype=torch.int64, device=gpu.device))
    tail = (5,) if call is mean_cross_entropy else ()
    return call(x(torch.zeros(*shape, *tail, device=gpu.device)), target_Bl, group=world())


def counting(target: Spoil, rank: int, gpu: FakeGpu) -> object:
    return count_targets(target(torch.zeros(3, dtype=torch.int64, device=gpu.device)), group=world())


def output(rank: int, gpu: FakeGpu, *, spoil: Spoil) -> object:
    part = shard_batch(
        of_attention.batch_of(gpu, padded=False), sharding=of_attention.tokens_of_ranks(), group=world()
    )
    assert isinstance(part, ShardedBatch)
    return gather_outputs(spoil(gpu.tensor(of_attention.drawn(rank, 3).detach())), batch=part, group=world())


def static(ids: Spoil, rank: int, gpu: FakeGpu) -> object:
    return plan_static(
        ids(gpu.tensor(of_experts.drawn(rank)[0])), sizes=of_experts.sizes_of_ranks(), group=world(), **terms()
    )


# By name: what rank 1 does, what the others do, and what all of them say.
Case = tuple[Callable[[int, FakeGpu], object], Callable[[int, FakeGpu], object], str]


def spoiled(call: Callable[..., object], count: int, *wrong: tuple[int, Spoil], tail: tuple[Any, ...] = ()) -> Any:
    """``call`` with ``count`` spoilers, of which some spoil; and with none that does."""
    spoils = [dict(wrong).get(i, keep) for i in range(count)]
    return partial(call, *spoils, *tail), partial(call, *[keep] * count, *tail)


NO_PLANNER = (lambda rank: {},)
OF_NODES = (lambda rank: {"planner": of_experts.nodes_of(rank)},)
SAME: dict[str, Case] = {
    "plan_dispatch, ids": (*spoiled(plan, 2, (0, host)), f"expert_BlK is {AT_CPU}"),
    "plan_dispatch, weights": (
        *spoiled(plan, 2, (1, host)),
        "weight_BlK is on cpu, but expert_BlK on cuda:0; move it there",
    ),
    "plan_dispatch, both": (*spoiled(plan, 2, (0, host), (1, host)), f"expert_BlK is {AT_CPU}"),
    "plan_dispatch, a list": (*spoiled(plan, 2, (0, as_list)), "expert ids are <class 'list'>"),
    "plan_dispatch, lists": (*spoiled(plan, 2, (0, as_list), (1, as_list)), "expert ids are <class 'list'>"),
    "plan_hierarchical, ids": (*spoiled(plan_of_nodes, 1, (0, host)), f"expert_BlK is {AT_CPU}"),
    "plan_hierarchical, a list": (*spoiled(plan_of_nodes, 1, (0, as_list)), "expert ids are <class 'list'>"),
    "MoE, x": (*spoiled(layer, 3, (0, host), tail=NO_PLANNER), f"x is {AT_CPU}"),
    "MoE, x, a list": (*spoiled(layer, 3, (0, as_list), tail=NO_PLANNER), "x is list; it has to be a tensor"),
    "MoE, x, of nodes": (*spoiled(layer, 3, (0, host), tail=OF_NODES), f"x is {AT_CPU}"),
    "MoE, real": (*spoiled(layer, 3, (1, host), tail=NO_PLANNER), "real_Bl is on cpu, but x on cuda:0"),
    "MoE, ids": (*spoiled(layer, 3, (2, host), tail=NO_PLANNER), "expert_BlK is on cpu, but x on cuda:0"),
    "shard_batch": (
        *spoiled(batch, 1, (0, lambda b: replace(b, token_BL=host(b.token_BL), attention_mask=None))),
        f"token_BL is {AT_CPU}",
    ),
    "shard_batch, a list": (
        *spoiled(batch, 1, (0, lambda b: replace(b, token_BL=as_list(b.token_BL), attention_mask=None))),
        "token_BL is list; it has to be a tensor",
    ),
    "shard_batch, a mask": (
        *spoiled(batch, 1, (0, lambda b: replace(b, attention_mask=host(b.attention_mask)))),
        "attention_mask is on cpu, but token_BL on cuda:0; move it there",
    ),
    "shard_batch, a field": (
        *spoiled(batch, 1, (0, lambda b: replace(b, fields={"a": host(b.token_BL)}))),
        "fields['a'] is on cpu, but token_BL on cuda:0; move it there",
    ),
    "mean_loss, targets": (*spoiled(partial(loss, mean_loss), 2, (1, host)), "targets are on cpu"),
    "mean_loss, both": (*spoiled(partial(loss, mean_loss), 2, (0, host), (1, host)), f"loss_Bl is {AT_CPU}"),
    "mean_cross_entropy, targets": (*spoiled(partial(loss, mean_cross_entropy), 2, (1, host)), "targets are on cpu"),
    "mean_cross_entropy, both": (
        *spoiled(partial(loss, mean_cross_entropy), 2, (0, host), (1, host)),
        f"logits_BlV is {AT_CPU}",
    ),
    "mean_cross_entropy, a list": (
        *spoiled(partial(loss, mean_cross_entropy), 2, (0, as_list)),
        "logits_BlV is list; it has to be a tensor",
    ),
    "count_targets": (*spoiled(counting, 1, (0, host)), "targets are on cpu"),
    "gather_outputs": (partial(output, spoil=host), partial(output, spoil=keep), "the output is on cpu"),
    "agree": (
        lambda rank, gpu: agree("the same", device=torch.device("cpu"), group=world()),
        lambda rank, gpu: agree("the same", device=gpu.device, group=world()),
        "device is cpu, where the group does not communicate",
    ),
    "gather_sharding": (
        lambda rank, gpu: gather_sharding(3, device=torch.device("cpu"), group=world()),
        lambda rank, gpu: gather_sharding(3, device=gpu.device, group=world()),
        "device is cpu, where the group does not communicate",
    ),
}


def ends(wrong: Callable[[int, FakeGpu], object], right: Callable[[int, FakeGpu], object]) -> list[Ended[object]]:
    """Of ranks of which one is wrong; afterwards all of them are right, and their group works."""

    def case(rank: int, gpu: FakeGpu) -> object:
        try:
            (wrong if rank == WRONG else right)(rank, gpu)
        except ValueError as error:
            agree("the group works", device=gpu.device, group=world())
            raise error
        return None

    return ends_on_cuda(case, RANKS)


@pytest.mark.parametrize("name", SAME)
@pytest.mark.usefixtures("uncovered")
def test_what_one_rank_has_elsewhere_is_the_same_error_on_every_rank(name: str) -> None:
    wrong, right, told = SAME[name]
    errors = [end.error for end in ends(wrong, right)]
    assert all(isinstance(error, GroupError) for error in errors), errors
    assert len({str(error) for error in errors}) == 1, errors
    assert str(errors[0]).count(f"rank {WRONG}: ") >= 1 or "MoE, x, of nodes" in name or "hierarchical" in name
    assert told in str(errors[0])


def attending(attention: Callable[..., Tensor], spoils: tuple[Spoil, ...], rank: int, gpu: FakeGpu) -> object:
    q, k, v = (gpu.tensor(of_attention.drawn(rank, heads, 8).detach()) for heads in (4, 2, 2))
    q, k, v = (spoil(x) for spoil, x in zip(spoils, (q, k, v), strict=True))
    return attention(q, k, v, sharding=of_attention.tokens_of_ranks(), group=world())


def by_latents(spoil: Spoil, rank: int, gpu: FakeGpu) -> object:
    q, latent = (gpu.tensor(of_attention.drawn(rank, *shape).detach()) for shape in ((4, 8), (WIDE + TURNED,)))
    weights = [gpu.tensor(of_attention.on_whole(4, WIDE, width).detach()) for width in (8 - TURNED, 8)]
    return latent_attention_over_ranks(
        spoil(q), latent, expand=expand, weights=weights, sharding=of_attention.tokens_of_ranks(), group=world()
    )


ATTENTION: dict[str, tuple[Callable[[int, FakeGpu], object], Callable[[int, FakeGpu], object], str]] = {
    f"{name}, {which}": (
        partial(attending, attention, tuple(host if letter in which else keep for letter in "qkv")),
        partial(attending, attention, (keep, keep, keep)),
        told,
    )
    for name, attention in {
        "ulysses_attention": ulysses_attention,
        "attention_over_ranks": partial(attention_over_ranks, scheme=Scheme.gather()),
    }.items()
    for which, told in (("qkv", "q, k, v are on cpu, but the group"), ("v", "q, k, v are on cuda:0, cuda:0, cpu"))
} | {
    "latent_attention_over_ranks": (partial(by_latents, host), partial(by_latents, keep), "are on cpu, cuda:0"),
    "plan_static": (partial(static, host), partial(static, keep), f"expert_BlK is {AT_CPU}"),
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.usefixtures("uncovered")
def test_where_words_are_read_on_the_device_the_peers_have_an_assertion(name: str) -> None:
    wrong, right, told = ATTENTION[name]
    errors = [end.error for end in ends_on_cuda(lambda rank, gpu: (wrong if rank == WRONG else right)(rank, gpu), 4)]
    for rank, error in enumerate(errors):
        assert isinstance(error, ValueError if rank == WRONG else RuntimeError), error
    assert told in str(errors[WRONG])
