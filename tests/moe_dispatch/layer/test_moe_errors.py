"""One rank's mistake is the same error on every rank, and the layer works on."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import MoE, Partition, TokenSharding, TopKRouter
from moe_dispatch.testing import RankPool
from tests.support.dispatch.moe import DIM, Case, Outcome, assert_like_one_process, outcome, pull
from tests.support.ranks import refusal, world

WRONG = Case(seq=(3, 0, 2), experts=(2, 2, 2))


def spoil(x_BlD: Tensor, sharding: TokenSharding, mistake: str) -> tuple[Tensor, TokenSharding]:
    """What the rank at fault passes."""
    if mistake == "nan":
        x_BlD = x_BlD.detach().clone()
        x_BlD[1, 1, 3] = torch.nan
    elif mistake == "one token less":
        x_BlD = x_BlD[:, :-1]
    elif mistake == "another width":
        x_BlD = x_BlD[..., :5]
    elif mistake == "no batch":
        x_BlD = x_BlD.flatten(0, 1)
    elif mistake == "integers":
        x_BlD = x_BlD.detach().to(torch.int64)
    elif mistake == "float32":
        x_BlD = x_BlD.detach().float()
    elif mistake == "no gradient":
        x_BlD = x_BlD.detach()
    elif mistake == "the other order":
        sharding = TokenSharding(batch=2, seq=sharding.seq, order="LB")
        x_BlD = x_BlD.transpose(0, 1)
    elif mistake == "the same sizes elsewhere":
        sharding = TokenSharding(batch=2, seq=Partition((3, 0, 2, 1))).select((0, 1, 2))
    return x_BlD, sharding


def refused_then_right(rank: int, at_fault: int, mistake: str) -> tuple[str, Outcome]:
    """The text of the refusal, and a right forward and backward of the same layer afterwards."""
    moe, (x_BlD, pull_BlD, pull_BlE) = WRONG.layer(rank), WRONG.shards(rank)
    given_BlD, sharding = spoil(x_BlD, WRONG.sharding, mistake) if rank == at_fault else (x_BlD, WRONG.sharding)
    text = refusal(lambda: moe(given_BlD, sharding=sharding))
    moe.load_E.zero_()
    results = moe(x_BlD, sharding=WRONG.sharding)
    pull(results, pull_BlD, pull_BlE).backward()
    return text, outcome(moe, x_BlD, results)


SHARD = (
    "its shard in order 'BL' is (2, 3, 8), of a floating-point dtype: pass the tokens that the sharding gives this "
    "rank"
)


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        ("one token less", f"rank 0: x is (2, 2, 8) of torch.float64; {SHARD}"),
        ("another width", f"rank 0: x is (2, 3, 5) of torch.float64; {SHARD}"),
        ("no batch", f"rank 0: x is (6, 8) of torch.float64; {SHARD}"),
        ("integers", f"rank 0: x is (2, 3, 8) of torch.int64; {SHARD}"),
        (
            "nan",
            "rank 0: the weight at local token 4, choice 0 is NaN; look for NaN or Inf in the router's input",
        ),
    ],
)
def test_one_ranks_mistake_is_the_same_error_on_every_rank(mistake: str, text: str, rank_pool: RankPool) -> None:
    texts, outcomes = zip(*rank_pool.run(refused_then_right, 3, 0, mistake), strict=True)
    assert texts == (text,) * 3
    assert_like_one_process(WRONG, outcomes)


@pytest.mark.parametrize("mistake", ["the other order", "the same sizes elsewhere", "float32"])
def test_ranks_that_disagree_are_told_so(mistake: str, rank_pool: RankPool) -> None:
    texts, outcomes = zip(*rank_pool.run(refused_then_right, 3, 0, mistake), strict=True)
    assert len(set(texts)) == 1
    assert "the ranks disagree about one call" in texts[0]
    assert "[0]" in texts[0]
    assert "[1, 2]" in texts[0]
    assert_like_one_process(WRONG, outcomes)


def one_rank_without_gradient(rank: int, without: str) -> str:
    """What a layer with a frozen router says where tokens of rank 1, or its experts and no tokens, need gradients."""
    moe, (x_BlD, _, _) = WRONG.layer(rank), WRONG.shards(rank)
    moe.router.requires_grad_(False)
    if rank == 1 or without == "experts":
        x_BlD.requires_grad_(False)
    if rank == 1 and without == "experts":
        moe.experts.requires_grad_(False)
    return refusal(lambda: moe(x_BlD, sharding=WRONG.sharding))


@pytest.mark.parametrize(("without", "of_others"), [("tokens", True), ("experts", False)])
def test_a_rank_that_would_leave_backward_to_its_peers_is_told(
    without: str, of_others: bool, rank_pool: RankPool
) -> None:
    texts = rank_pool.run(one_rank_without_gradient, 3, without)
    assert len(set(texts)) == 1
    assert "the ranks disagree about one call" in texts[0]
    assert f"gradients of tokens or weights {of_others}, of these or experts True" in texts[0]
    assert f"gradients of tokens or weights False, of these or experts {of_others}" in texts[0]


def test_a_mistake_of_the_last_rank_is_told_too(rank_pool: RankPool) -> None:
    for text, _ in rank_pool.run(refused_then_right, 3, 2, "another width"):
        assert text.startswith("rank 2: x is (2, 2, 5) of torch.float64; its shard in order 'BL' is (2, 2, 8)")


def wrong_for_all(rank: int, kind: str) -> str:
    """Mistakes that every rank sees by itself."""
    case = Case(seq=(3, 2), experts=(2, 2))
    router, experts, _ = case.parts()
    of_rank: dict[str, Any] = {
        "router": router,
        "experts": case.layer(rank).experts,
        "partition": case.partition,
        "group": world(),
    }
    sharding = TokenSharding(batch=2, seq=Partition((2, 2, 1)))

    def layer(**changed: Any) -> MoE:
        return MoE(**(of_rank | changed))

    calls = {
        "experts": lambda: layer(experts=experts),
        "router": lambda: layer(router=TopKRouter(DIM, 3, 1, score="sigmoid")),
        "partition": lambda: layer(partition=Partition((2, 1, 1))),
        "group": lambda: layer(group=None),
        "sharding": lambda: layer()(torch.zeros(*sharding.local_shape(rank), DIM), sharding=sharding),
    }
    return refusal(calls[kind])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "experts",
            "a router over 4 experts and 4 experts on rank {rank}, but Partition(sizes=(2, 2)) has 4 experts, 2 of "
            "them here; build both from the partition",
        ),
        (
            "router",
            "a router over 3 experts and 2 experts on rank {rank}, but Partition(sizes=(2, 2)) has 4 experts, 2 of "
            "them here; build both from the partition",
        ),
        (
            "partition",
            "the partition of experts describes 3 ranks, but the group has 2; they have to be equal, one piece per "
            "rank in the group's rank order (for a group that is part of a mesh: sharding.select(ranks))",
        ),
        (
            "group",
            "group is None; pass the process group explicitly, e.g. torch.distributed.group.WORLD once "
            "init_process_group has run, or device_mesh.get_group()",
        ),
        (
            "sharding",
            "the token sharding describes 3 ranks, but the group has 2; they have to be equal, one piece per rank in "
            "the group's rank order (for a group that is part of a mesh: sharding.select(ranks))",
        ),
    ],
)
def test_what_every_rank_can_see_is_refused_before_any_exchange(kind: str, text: str, rank_pool: RankPool) -> None:
    assert rank_pool.run(wrong_for_all, 2, kind) == [text.format(rank=rank) for rank in range(2)]
