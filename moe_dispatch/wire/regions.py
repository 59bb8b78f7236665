"""Between a rank's tokens and the whole sequence, at uneven lengths, as tensor-parallel regions need it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.sharding import TokenSharding
from ..layout.stacked import rows_of_tokens, stacked_tokens
from .exchange import check_group, exchange_rows, gathered_starts, is_one_message, start_gather
from .local_tensors import refuse_dtensors
from .policies import unseen_by_policies


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
    if is_one_message(sharding.local_sizes, x_tD.device.type) and not torch.compiler.is_compiling():
        return _GatherTokens.apply(x_tD, sharding, group).unflatten(0, sharding.global_shape)  # type: ignore[union-attr]
    repeated = x_tD.expand(sharding.num_ranks, *x_tD.shape).flatten(0, 1)
    x_GD = exchange_rows(repeated, (len(x_tD),) * sharding.num_ranks, sharding.local_sizes, group)
    x_TD = torch.zeros_like(x_GD).index_copy(0, _kept(stacked_tokens, sharding, x_GD.device), x_GD)
    return x_TD.unflatten(0, sharding.global_shape)


class _GatherTokens(torch.autograd.Function):
    """forward   x_TD = the tokens of all ranks, by an all-gather
    backward  d x_tD = over the ranks, in their order, the sum of d x_TD at this rank's tokens: exchanged home
    """

    @staticmethod
    @unseen_by_policies
    def forward(ctx: Any, x_tD: Tensor, sharding: TokenSharding, group: dist.ProcessGroup) -> Tensor:
        ctx.sharding, ctx.group, sizes = sharding, group, sharding.local_sizes
        gathered = start_gather(x_tD.contiguous().unsqueeze(0), sizes, group).wait()
        starts = gathered_starts(sizes, x_tD.device.type)
        return gathered.index_select(0, _kept(rows_of_tokens, sharding, starts, x_tD.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sharding, ranks = ctx.sharding, ctx.sharding.num_ranks
        grad_GD = grads[0].index_select(0, _kept(stacked_tokens, sharding, grads[0].device))
        sent, received = sharding.local_sizes, (sharding.local_sizes[ctx.group.rank()],) * ranks
        home = exchange_rows(grad_GD, sent, received, ctx.group)
        return home.unflatten(0, (ranks, received[0])).sum(0), None, None


def _kept(make: Callable[..., Tensor], sharding: TokenSharding, *args: Any) -> Tensor:
    """What ``make`` gives of a sharding, kept by it. Compiled code makes it in its graph."""
    if torch.compiler.is_compiling():
        return make(sharding, *args)
    with torch.inference_mode(False):  # it outlives the call
        return sharding.keep((make, *args), lambda: make(sharding, *args))
