"""Compiled: what is a graph break says why, and a compiled checkpoint recomputes exchanges on all ranks or none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch.utils.checkpoint import checkpoint

from moe_dispatch import Partition, TokenSharding, exchange_rows, gather_tokens
from moe_dispatch.testing import RankPool
from sp_attention import heads_from_tokens, tokens_from_heads
from tests.support.compile import untraced
from tests.support.composed.subjects import EVEN, made, shards_of
from tests.support.ranks import world
from tests.support.tensors import TOLERANCE, difference, grad_of, leaf

REASONS = {
    "MoE": "compile what is around MoE layers",
    "dispatch, combine": "plan outside of what is compiled",
    "attention_over_ranks": "who needs which rows is worked out in Python",
    "shard_batch": "cut batches outside of what is compiled",
}


@untraced()
def refusals(rank: int) -> dict[str, bool]:
    """Whether a whole graph is refused with the reason."""
    torch._dynamo.reset()
    x_BlD, _ = shards_of(EVEN, rank, torch.float32)
    found = {}
    for what, reason in REASONS.items():
        with pytest.raises(Unsupported) as refused:
            torch.compile(made(what, EVEN, world()), fullgraph=True, backend="eager")(x_BlD)
        found[what] = reason in str(refused.value)
    return found


def test_a_graph_break_says_why(rank_pool: RankPool) -> None:
    assert rank_pool.run(refusals, 2) == [dict.fromkeys(REASONS, True)] * 2


def rows_of_the_first(x_LD: Tensor) -> Tensor:
    """Nothing for the second rank, which has nothing."""
    counts = (len(x_LD), 0) if world().rank() == 0 else (0, 0)
    return exchange_rows(x_LD, counts, counts, world())


def whole_sequence(x_LD: Tensor) -> Tensor:
    sharding = TokenSharding(batch=1, seq=Partition((5, 0)))
    return gather_tokens(x_LD.unsqueeze(0), sharding=sharding, group=world())


def heads_and_back(x_LD: Tensor) -> Tensor:
    sharding, heads = TokenSharding(batch=1, seq=Partition((5, 0))), Partition((2, 0))
    x_LnH = heads_from_tokens(x_LD.view(1, -1, 2, 4), sharding=sharding, heads=heads, group=world())
    return tokens_from_heads(torch.tanh(x_LnH), sharding=sharding, heads=heads, group=world()).flatten(2)


EXCHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "exchange_rows": rows_of_the_first,
    "gather_tokens": whole_sequence,
    "heads_from_tokens, tokens_from_heads": heads_and_back,
}


@untraced()
def recomputed(rank: int, name: str, backend: str) -> float:
    """How far a compiled checkpoint is from one that is not; what follows the exchange is saved for its gradient."""
    torch._dynamo.reset()
    weight_DD = torch.linspace(-1, 1, 64, dtype=torch.float64).view(8, 8).sin().requires_grad_()
    x_LD = torch.linspace(-1, 1, 40, dtype=torch.float64).view(5, 8)[: (5, 0)[rank]]

    def block(x_LD: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(EXCHANGES[name](x_LD @ weight_DD)) @ weight_DD)

    def run(x_LD: Tensor) -> Any:
        return checkpoint(block, x_LD, use_reentrant=False)

    found = []
    for runs in (run, torch.compile(run, backend=backend, fullgraph=True)):
        weight_DD.grad, mine_LD = None, leaf(x_LD)
        runs(mine_LD).square().sum().backward()
        found.append([grad_of(weight_DD), grad_of(mine_LD)])
    return max(map(difference, *found))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("name", EXCHANGES)
def test_a_compiled_checkpoint_with_nothing_on_one_rank(rank_pool: RankPool, name: str, backend: str) -> None:
    for found in rank_pool.run(recomputed, 2, name, backend, timeout=60):
        assert found < TOLERANCE
