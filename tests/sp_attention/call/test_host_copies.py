"""A call makes no tensor from numbers of the host."""

from unittest.mock import patch

import pytest
import torch

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from sp_attention import ulysses_attention
from tests.support.ranks import world


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
