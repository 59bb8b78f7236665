"""Packed documents, and one rank's output and gradients of them."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from sp_attention import ulysses_attention
from tests.support.ranks import world
from tests.support.tensors import grad_of, leaf, share

Sizes = tuple[int, ...]
Spans = list[tuple[int, int]]


def documents(reals: list[int], slots: list[int], before: int = 0) -> dict[str, Any]:
    """cu_seqlens and cu_seqlens_padded."""
    return {
        "cu_seqlens": torch.tensor([0, *accumulate(reals)]),
        "cu_seqlens_padded": torch.tensor([*accumulate(slots, initial=before)]),
    }


def tensors(length: int, heads: int = 4, groups: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the gradient of the output: (1, L, heads, width)."""
    draw = torch.Generator().manual_seed(length)
    shapes = ((heads, 6), (groups, 6), (groups, 4), (heads, 4))
    return [
        torch.randn(1, length, num, width, generator=draw, dtype=torch.float64).to(dtype) for num, width in shapes
    ]


def attended(rank: int, seq: Sizes, whole: list[Tensor], **options: Any) -> list[Tensor]:
    """This rank's out, dq, dk, dv."""
    q_BlNH, k_BlGH, v_BlGH = (leaf(share(x, seq, "BL", rank)) for x in whole[:3])
    sharding = TokenSharding(batch=1, seq=Partition(seq))
    out_BlNH = ulysses_attention(q_BlNH, k_BlGH, v_BlGH, sharding=sharding, group=world(), **options)
    out_BlNH.backward(share(whole[3], seq, "BL", rank))
    return [out_BlNH.detach(), grad_of(q_BlNH), grad_of(k_BlGH), grad_of(v_BlGH)]
