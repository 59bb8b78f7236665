"""Between a rank's tokens and the whole sequence, at uneven lengths, as tensor-parallel regions need it."""

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.sharding import TokenSharding
from ..layout.stacked import stacked_tokens
from .exchange import check_group, exchange_rows
from .local_tensors import refuse_dtensors


def place_tokens(x_BlD: Tensor, *, sharding: TokenSharding, rank: int) -> Tensor:
    """Zeros with this rank's tokens at their global places: summed over the ranks, it is the whole. No communication.

    Args:
        x_BlD: (b, l, ...), or (l, b, ...), the tokens of ``rank``.

    Returns:
        (B, L, ...), or (L, B, ...): what DTensor calls ``Partial``. The gradient is ``rank``'s piece of the incoming
        one.

    Raises:
        ValueError: a shape that is not the rank's shard, or a DTensor.
    """
    refuse_dtensors(x_BlD=x_BlD)
    sharding.check_local(x_BlD, rank)
    x_TD = x_BlD.new_zeros((sharding.num_tokens, *x_BlD.shape[2:]))
    x_TD = x_TD.index_copy(0, sharding.tokens(rank, x_BlD.device), x_BlD.flatten(0, 1))
    return x_TD.unflatten(0, sharding.global_shape)


def gather_tokens(x_BlD: Tensor, *, sharding: TokenSharding, group: dist.ProcessGroup) -> Tensor:
    """The whole, on every rank. One collective; one more in backward.

    Args:
        x_BlD: (b, l, ...), or (l, b, ...), this rank's tokens.
        sharding: who of ``group`` holds which token; together they hold all.

    Returns:
        (B, L, ...), or (L, B, ...). Backward sums each token's gradient over the ranks: what each rank did with the
        whole counts.

    Raises:
        ValueError: a shape that is not this rank's shard, a DTensor, a sharding that leaves tokens out, or a group
            of another size. Raised on this rank before the collective.
    """
    refuse_dtensors(x_BlD=x_BlD)
    check_group(group, sharding.num_ranks, "the token sharding")
    sharding.check_whole("gather_tokens")
    sharding.check_local(x_BlD, group.rank())
    x_tD = x_BlD.flatten(0, 1)
    repeated = x_tD.expand(sharding.num_ranks, *x_tD.shape).flatten(0, 1)
    x_GD = exchange_rows(repeated, (len(x_tD),) * sharding.num_ranks, sharding.local_sizes, group)
    x_TD = torch.zeros_like(x_GD).index_copy(0, stacked_tokens(sharding, x_GD.device), x_GD)
    return x_TD.unflatten(0, sharding.global_shape)
