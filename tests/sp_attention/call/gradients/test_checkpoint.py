"""A checkpoint on ranks of different fortunes: without heads, with nothing to save, with frozen tensors."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from sp_attention import scaled_dot_product, ulysses_attention
from sp_attention.wire import exchange
from tests.support.ranks import world
from tests.support.tensors import grad_of, leaf

SEQ = (3, 2, 0)  # and 2 heads: the last rank has neither tokens nor heads
SHARDING = TokenSharding(batch=2, seq=Partition(SEQ))


def saves_nothing(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> Tensor:
    return q_BLnH + (k_BLgH + v_BLgH)


# ---- cases: what the ranks run -------------------------------------------------------------------------


def leaves_of(rank: int, frozen: bool) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    wholes = [torch.randn(2, 5, 2, 4, generator=draw, dtype=torch.float64) for _ in range(3)]
    return [leaf(SHARDING.shard(whole, rank)).requires_grad_(not frozen) for whole in wholes]


def gradients(rank: int, recompute: bool, frozen: bool, attend: Callable[..., Tensor]) -> tuple[list[Tensor], int]:
    """Of q, k, v, or where they are frozen of the sinks; and how many exchanges it took."""
    leaves, options = leaves_of(rank, frozen), {}
    if frozen:
        options["sinks_N"] = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def attention(*tensors: Tensor) -> Tensor:
        return ulysses_attention(*tensors, sharding=SHARDING, group=world(), attend=attend, **options)

    trades: list[None] = []
    exchange_tensors = exchange.exchange_tensors

    def counted(*args: Any) -> None:
        trades.append(None)
        exchange_tensors(*args)

    with patch.object(exchange, "exchange_tensors", counted):
        out_BlNH = checkpoint(attention, *leaves, use_reentrant=False) if recompute else attention(*leaves)
        assert isinstance(out_BlNH, Tensor)
        out_BlNH.square().sum().backward()
    return [grad_of(x) for x in ([options["sinks_N"]] if frozen else leaves)], len(trades)


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frozen", "attend", "exchanges"),
    [(False, saves_nothing, 5), (False, scaled_dot_product, 5), (True, scaled_dot_product, 4)],
)
def test_a_checkpoint_recomputes_on_every_rank_or_on_none(
    rank_pool: RankPool, frozen: bool, attend: Callable[..., Tensor], exchanges: int
) -> None:
    """There and back, back and there in backward (frozen tensors: one of them), and there once more to recompute."""
    plain = rank_pool.run(gradients, 3, False, frozen, attend)
    again = rank_pool.run(gradients, 3, True, frozen, attend)
    for (wanted, _), (got, found) in zip(plain, again, strict=True):
        assert all(map(torch.equal, got, wanted))
        assert found == exchanges
