"""Backward on ranks of different fortunes: without heads, with nothing to save, with frozen tensors. Nobody waits."""

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
from sp_attention.attend.dropout import Dropout
from sp_attention.wire import exchange
from tests.sp_attention.call.test_ulysses import grad_of, leaf, world

SEQ = (3, 2, 0)  # and 2 heads: the last rank has neither tokens nor heads
SHARDING = TokenSharding(batch=2, seq=Partition(SEQ))


def saves_nothing(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> Tensor:
    return q_BLnH + (k_BLgH + v_BLgH)


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
    trade = exchange.trade

    def counted(*args: Any) -> None:
        trades.append(None)
        trade(*args)

    with patch.object(exchange, "trade", counted):
        out_BlNH = checkpoint(attention, *leaves, use_reentrant=False) if recompute else attention(*leaves)
        assert isinstance(out_BlNH, Tensor)
        out_BlNH.square().sum().backward()
    return [grad_of(x) for x in ([options["sinks_N"]] if frozen else leaves)], len(trades)


@pytest.mark.parametrize(
    ("frozen", "attend", "exchanges"),
    [(False, saves_nothing, 5), (False, scaled_dot_product, 5), (True, scaled_dot_product, 4)],
)
def test_a_checkpoint_recomputes_on_every_rank_or_on_none(
    rank_pool: RankPool, frozen: bool, attend: Callable[..., Tensor], exchanges: int
) -> None:
    """There and back, back and there in backward (frozen tensors: one of them), and there once more to recompute."""
    plain = rank_pool.run(gradients, 3, False, frozen, attend, timeout=20)
    again = rank_pool.run(gradients, 3, True, frozen, attend, timeout=20)
    for (wanted, _), (got, found) in zip(plain, again, strict=True):
        assert all(map(torch.equal, got, wanted))
        assert found == exchanges


@pytest.mark.parametrize("option", ["none", "sinks", "dropout"])
@pytest.mark.parametrize(("dtype", "mask_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_the_lowest_number_of_a_wider_mask_is_a_no(dtype: torch.dtype, mask_dtype: torch.dtype, option: str) -> None:
    """As -inf is: a row of it gives 0, and no NaN. It is -inf in the narrower dtype."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "none": {},
        "sinks": {"sinks_n": torch.full((2,), -torch.inf)},
        "dropout": {"dropout": Dropout(p=0.5)},
    }[option]
    q_BLnH, k_BLgH, v_BLgH = (torch.randn(1, 4, 2, 8).to(dtype).requires_grad_() for _ in range(3))
    found = []
    for no in (torch.finfo(mask_dtype).min, -torch.inf):
        mask_LL = torch.zeros(4, 4, dtype=mask_dtype)
        mask_LL[0], mask_LL[1, 2:] = no, no
        out_BLnH = scaled_dot_product(q_BLnH, k_BLgH, v_BLgH, attn_mask=mask_LL[None, None], **options)
        assert not out_BLnH[:, 0].any()
        found.append([out_BLnH, *torch.autograd.grad(out_BLnH.float().sum(), (q_BLnH, k_BLgH, v_BLgH))])
    assert all(torch.equal(low, minus_inf) for low, minus_inf in zip(*found, strict=True))
    assert not any(x.isnan().any() for x in found[0])


def tensors_from_numbers(rank: int, heads: int, kv_heads: int, dropout_p: float) -> int:
    """How often a call makes a tensor from numbers of the host: on CUDA a copy that waits for the device."""
    sharding = TokenSharding(batch=1, seq=Partition((2, 1, 1, 1)))
    q_BlNH, k_BlGH, v_BlGH = (torch.randn(*sharding.local_shape(rank), n, 4) for n in (heads, kv_heads, kv_heads))
    with patch.object(torch, "tensor", side_effect=torch.tensor) as made:
        ulysses_attention(
            q_BlNH, k_BlGH, v_BlGH, sharding=sharding, group=world(), is_causal=True, dropout_p=dropout_p
        )
    return made.call_count


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (6, 3), (4, 1)])
def test_nothing_is_copied_to_the_device(rank_pool: RankPool, heads: int, kv_heads: int) -> None:
    for dropout_p in (0.0, 0.5):
        assert rank_pool.run(tensors_from_numbers, 4, heads, kv_heads, dropout_p) == [0] * 4
