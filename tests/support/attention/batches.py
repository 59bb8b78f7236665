"""Batches whose tokens name their row and place, and the whole of what the ranks hold."""

import math
from typing import Literal

import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from sp_attention import Batch, ShardedBatch, shard_batch
from tests.support.ranks import world

Order = Literal["BL", "LB"]
ORDERS: tuple[Order, ...] = ("BL", "LB")
NONE = -100


def tokens(batch: int, length: int) -> Tensor:
    """(B, L): row b, place l is 100 b + l."""
    return 100 * torch.arange(batch)[:, None] + torch.arange(length)


def sharding_of(batch: int, seq: tuple[int, ...], order: Order = "BL") -> TokenSharding:
    return TokenSharding(batch=batch, seq=Partition(seq), order=order)


def sharded(rank: int, batch: Batch, sharding: TokenSharding) -> ShardedBatch:
    part = shard_batch(batch, sharding=sharding, group=world())
    assert part.rank == rank
    assert part.sharding == sharding
    return part


def whole_of(shards: list[Tensor], sharding: TokenSharding) -> Tensor:
    """The whole (..., B, L) from every rank's (..., B, l) or (..., l, B), by slices."""
    along = -1 if sharding.order == "BL" else -2
    whole = torch.cat(shards, dim=along)
    return whole if sharding.order == "BL" else whole.transpose(-1, -2)


GOOD = Batch(token_BL=tokens(2, 5))
REAL_BL = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]]).bool()


def added(mask: Tensor, lowest: float = -math.inf, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, lowest)


def pairs() -> Tensor:
    """(B, 1, L, L): causal, real queries and keys only."""
    return (torch.ones(4, 4).tril().bool() & REAL_BL[:, None] & REAL_BL[:, :, None])[:, None]
