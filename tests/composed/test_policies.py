"""Selective checkpoints: the gradients of no checkpoint, whichever operation the policy saves, each by itself."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moe_dispatch import Partition, TokenSharding, gather_tokens, place_tokens
from moe_dispatch.testing import RankThreads
from sp_attention import (
    Scheme,
    attention_over_ranks,
    gather_outputs,
    scaled_dot_product,
    shard_batch,
    ulysses_attention,
)
from sp_attention.batch.batch import Batch
from tests.support.composed.ways import saved
from tests.support.dispatch.moe import Case, gradients_of, pull
from tests.support.dispatch.plans import KINDS, Kind, planner_of
from tests.support.ranks import world
from tests.support.tensors import grad_of, leaf

pytestmark = pytest.mark.usefixtures("uncovered")
Block = Callable[[Tensor], Tensor]


class Recorded(TorchDispatchMode):
    """The operations that a policy may be asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def wrong_policies(
    names: Sequence[str], block: Block, x: Tensor, gradients: Callable[[], list[Tensor]]
) -> tuple[set[str], list[str]]:
    """The operations there are; and those of ``names`` that, saved alone, give other gradients than no checkpoint."""

    def found(run: Callable[[Tensor], Any]) -> list[Tensor]:
        mine = leaf(x)
        torch.manual_seed(2)  # of dropout
        run(mine).square().sum().backward()
        return [grad_of(mine), *gradients()]

    with Recorded() as recorded:
        wanted = found(block)
    wrong = []
    for name in names:
        contexts = saved(lambda operation, name=name: str(operation) == name)
        got = found(partial(checkpoint, block, use_reentrant=False, context_fn=contexts))
        if not all(map(torch.equal, got, wanted)):
            wrong.append(name)
    return recorded.names, wrong


def assert_every_policy_is_right(
    rank_threads: RankThreads, ranks: int, case: Callable[..., tuple[set[str], list[str]]], *args: Any
) -> None:
    """Every rank saves the same: ranks that have nothing have operations of their own, too."""
    names = set[str]().union(*(names for names, _ in rank_threads.run(case, ranks, [], *args)))
    assert len(names) > 10
    for _, wrong in rank_threads.run(case, ranks, sorted(names), *args, timeout=120):
        assert wrong == []


def of_layer(rank: int, names: Sequence[str], kind: Kind, case: Case) -> tuple[set[str], list[str]]:
    x_BlD, *pulls = case.shards(rank)
    with planner_of(kind, rank, case.sizes) as planner:
        moe = case.layer(rank, planner=planner)

        def block(x_BlD: Tensor) -> Tensor:
            results = moe(torch.tanh(x_BlD), sharding=case.sharding)
            return torch.tanh(pull(results, *pulls))

        def gradients() -> list[Tensor]:
            found = list(gradients_of(moe).values())
            moe.zero_grad()
            return found

        return wrong_policies(names, block, x_BlD.detach(), gradients)


SWEPT = {kind: (pytest.mark.sweep,) for kind in KINDS if kind != "hierarchical"}  # which has the others in it


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SWEPT.get(kind, ())) for kind in KINDS])
def test_a_layer_by_each_kind_of_plan(rank_threads: RankThreads, kind: Kind) -> None:
    case = Case(seq=(3, 1, 0, 2), experts=(2, 0, 3, 1), top_k=3)
    assert_every_policy_is_right(rank_threads, 4, of_layer, kind, case)


SHARDING = TokenSharding(batch=1, seq=Partition((3, 0, 4)))
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"is_causal": True},
    "window": {"window": (1, 1)},
    "dropout": {"dropout_p": 0.4},
    "padding": {"key_padding_mask": torch.arange(7)[None] < 5},
    "mask": {"attn_mask": torch.linspace(-1, 1, 49, dtype=torch.float64).view(7, 7)},
    "sinks": {"sinks_N": torch.linspace(-1, 1, 2, dtype=torch.float64)},
    "documents": {"cu_seqlens": torch.tensor([0, 2, 5]), "cu_seqlens_padded": torch.tensor([0, 3, 7])},
    "ring keys, dropout": {"scheme": Scheme.ring(keep=True, chunk=2), "dropout_p": 0.4},
    "gathered keys for an attend": {"scheme": Scheme.gather(), "attend": scaled_dot_product, "window": (1, 1)},
    "shared heads, chunks": {"scheme": Scheme.ulysses(offload=True, chunk=3), "is_causal": True},
}


def of_attention(rank: int, names: Sequence[str], option: str) -> tuple[set[str], list[str]]:
    x_BlD = SHARDING.shard(torch.linspace(-2, 2, 7 * 24, dtype=torch.float64).view(1, 7, 24).sin(), rank)

    def block(x_BlD: Tensor) -> Tensor:
        qkv = x_BlD.unflatten(-1, (2, 12)).split(4, -1)
        attention: Callable[..., Tensor] = attention_over_ranks if "scheme" in OPTIONS[option] else ulysses_attention
        return torch.tanh(attention(*qkv, sharding=SHARDING, group=world(), **OPTIONS[option]))

    return wrong_policies(names, block, x_BlD, list)


IN_SHORT = {"window", "dropout", "documents", "gathered keys for an attend"}


@pytest.mark.parametrize(
    "option", [pytest.param(name, marks=() if name in IN_SHORT else (pytest.mark.sweep,)) for name in OPTIONS]
)
def test_attention_with_each_option(rank_threads: RankThreads, option: str) -> None:
    assert_every_policy_is_right(rank_threads, 3, of_attention, option)


def of_regions(rank: int, names: Sequence[str]) -> tuple[set[str], list[str]]:
    """gather_tokens, place_tokens, shard_batch and gather_outputs in one block."""
    x_BlD = SHARDING.shard(torch.linspace(-2, 2, 14, dtype=torch.float64).view(1, 7, 2), rank)

    def block(x_BlD: Tensor) -> Tensor:
        batch = shard_batch(Batch(token_BL=torch.arange(7)[None]), sharding=SHARDING, group=world())
        x_BlD = torch.tanh(x_BlD * batch.position_Bl.unsqueeze(-1))
        wholes = [
            gather_tokens(x_BlD, sharding=SHARDING, group=world()),
            place_tokens(x_BlD, sharding=SHARDING, rank=rank),
            gather_outputs(x_BlD, batch=batch, group=world()),
        ]
        return torch.tanh(torch.stack(wholes)).sum(0)

    return wrong_policies(names, block, x_BlD, list)


def test_regions_and_batches(rank_threads: RankThreads) -> None:
    assert_every_policy_is_right(rank_threads, 3, of_regions)


def sees_sums_of_rows(rank: int) -> bool:
    """Whether a mode around a selective checkpoint sees what `combine` does inside."""
    case = Case(seq=(3, 2), experts=(2, 3))
    moe, (x_BlD, _, _) = case.layer(rank), case.shards(rank)

    def block(x_BlD: Tensor) -> Tensor:
        return moe(x_BlD, sharding=case.sharding)[0]

    with Recorded() as recorded:
        checkpoint(block, x_BlD, use_reentrant=False, context_fn=saved(lambda operation: False))
    return any("embedding_bag" in name for name in recorded.names)


def test_other_modes_see_everything(rank_threads: RankThreads) -> None:
    assert rank_threads.run(sees_sums_of_rows, 2) == [True, True]
