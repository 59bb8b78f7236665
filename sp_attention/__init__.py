"""Attention over ranks: equal to attention on one rank, for any lengths, heads, masks, orders of tokens and schemes.

Words for where a token is:

    place      in the whole sequence, 0 to L - 1, padding included; where documents are packed, in the packed sequence
    position   the position id that the model embeds (rotary, learned); it may start anew in each document
    run        places that follow each other, in the sequence and in a rank's tensor
    document   a run of places whose tokens attend to each other only
    padding    a place that holds no token
"""

from .attend.blockwise import blockwise_attend
from .attend.default import scaled_dot_product
from .attend.flex import flex_attend
from .batch.balance import balance
from .batch.batch import Batch, ShardedBatch, gather_outputs
from .batch.labels import shift_labels
from .batch.loss import MeanLoss, count_targets, mean_cross_entropy, mean_loss
from .batch.shard import shard_batch
from .call.latent.attention import latent_attention_over_ranks
from .call.module import AttentionOverRanks, UlyssesAttention
from .call.over_ranks import attention_over_ranks
from .call.ulysses import ulysses_attention
from .choice.choose import SchemeChoice, choose_scheme
from .choice.cost import Machine, SchemeCost
from .parallel.mesh_batch import MeshBatch
from .parallel.parallel import Parallel
from .wire.exchange import heads_from_tokens, tokens_from_heads
from .work.scheme import Scheme

__all__ = [
    "AttentionOverRanks",
    "Batch",
    "Machine",
    "MeanLoss",
    "MeshBatch",
    "Parallel",
    "Scheme",
    "SchemeChoice",
    "SchemeCost",
    "ShardedBatch",
    "UlyssesAttention",
    "attention_over_ranks",
    "balance",
    "blockwise_attend",
    "choose_scheme",
    "count_targets",
    "flex_attend",
    "gather_outputs",
    "heads_from_tokens",
    "latent_attention_over_ranks",
    "mean_cross_entropy",
    "mean_loss",
    "scaled_dot_product",
    "shard_batch",
    "shift_labels",
    "tokens_from_heads",
    "ulysses_attention",
]
