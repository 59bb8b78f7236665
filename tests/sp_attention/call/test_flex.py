"""flex_attend over ranks: heads are global, and what it cannot honour is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from sp_attention import flex_attend, ulysses_attention
from sp_attention.reference import reference_attention
from tests.support.attention.flex import PADDING_BL, slope, tensors
from tests.support.ranks import refusal, world

# It says that the uncompiled function is slow: that is the point here.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
SEQ, HEADS = (3, 0, 4), (5, 5)


def over_ranks(rank: int, options: dict[str, Any]) -> list[Tensor]:
    """The output and gradients of this rank, with the slopes of global heads."""
    sharding = TokenSharding(batch=2, seq=Partition(SEQ))
    inputs = [sharding.shard(x, rank).clone().requires_grad_() for x in tensors(7, 7, heads=HEADS)]
    attend = flex_attend(score_mod=slope)
    out = ulysses_attention(*inputs, sharding=sharding, group=world(), attend=attend, **options)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


def refused(rank: int, options: dict[str, Any]) -> str:
    return refusal(lambda: over_ranks(rank, options))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (2, 1), "key_padding_mask": PADDING_BL}])
def test_heads_are_global_over_ranks(options: dict[str, Any], rank_pool: RankPool) -> None:
    inputs = [x.requires_grad_() for x in tensors(7, 7, heads=HEADS)]
    bias = torch.arange(5).view(5, 1, 1) * (torch.arange(7) - torch.arange(7)[:, None]) * 0.1
    out = reference_attention(*inputs, attn_mask=bias[None].double(), **options)
    wanted = [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]
    parts = rank_pool.run(over_ranks, 3, options)
    for got, whole in zip(zip(*parts, strict=True), wanted, strict=True):
        torch.testing.assert_close(torch.cat(got, dim=1), whole, rtol=0, atol=1e-5)  # head * 0.1 is float32


@pytest.mark.parametrize(
    ("options", "name"), [({"dropout_p": 0.1}, "dropout"), ({"sinks_N": torch.zeros(5)}, "sinks_n")]
)
def test_what_it_cannot_honour_is_refused(options: dict[str, Any], name: str, rank_pool: RankPool) -> None:
    for text in rank_pool.run(refused, 3, options):
        assert text.startswith(f"attend 'attend' takes no {name}; give it arguments of these names")
