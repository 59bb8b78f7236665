"""Ulysses sequence-parallel attention: equal to attention on one rank, for any lengths, heads and masks."""

from .attend import scaled_dot_product
from .attention import ulysses_attention
from .batch import Batch, Chunk, ShardedBatch, gather_outputs
from .exchange import heads_from_tokens, tokens_from_heads
from .flex import flex_attend
from .labels import shift_labels
from .loss import MeanLoss, mean_cross_entropy, mean_loss
from .module import UlyssesAttention
from .shard import shard_batch

__all__ = [
    "Batch",
    "Chunk",
    "MeanLoss",
    "ShardedBatch",
    "UlyssesAttention",
    "flex_attend",
    "gather_outputs",
    "heads_from_tokens",
    "mean_cross_entropy",
    "mean_loss",
    "scaled_dot_product",
    "shard_batch",
    "shift_labels",
    "tokens_from_heads",
    "ulysses_attention",
]
