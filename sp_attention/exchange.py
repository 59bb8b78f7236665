"""Trade tokens for heads and back: my tokens with all heads <-> all tokens with my heads.

Only views, ``cat`` and ``exchange_rows``, so autograd makes the exact adjoint: the counts of its exchange are those
of the forward, swapped. Real lengths travel, nothing is padded, and a rank without tokens or heads takes part in
everything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding, check_group, exchange_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """What of one tensor goes to which rank.

    Attributes:
        sharding: the tokens of the tensor.
        heads: heads sent to each rank, side by side in the order of the ranks.
    """

    sharding: TokenSharding
    heads: Partition


def heads_from_tokens(
    x_BlNH: Tensor, *, sharding: TokenSharding, heads: Partition, group: dist.ProcessGroup
) -> Tensor:
    """My tokens, all heads -> all tokens, my heads. One collective; one in backward.

    Args:
        x_BlNH: (B, l, N, H), or (l, B, N, H) for order "LB": this rank's tokens.
        sharding: which tokens each rank of ``group`` holds; its batch is not cut.
        heads: which of the N heads each rank gets.
        group: the sequence-parallel process group.

    Returns:
        ``x_BLnH``: (B, L, n, H), or (L, B, n, H).

    Raises:
        ValueError: a shape that is not this rank's shard with N heads, or a sharding or partition of another number
            of ranks. Only this rank can see its shape, so it is raised here and not on its peers.
    """
    check_lane(sharding, heads, group)
    rank = group.rank()
    wanted = (*sharding.local_shape(rank), heads.total)
    if x_BlNH.ndim != 4 or tuple(x_BlNH.shape[:3]) != wanted:
        raise ValueError(
            f"rank {rank} has a tensor of shape {tuple(x_BlNH.shape)}; its tokens with all heads are "
            f"{(*wanted, 'H')} in order {sharding.order!r}, as sharding.shard(x, {rank}) cuts them"
        )
    (x_BLnH,), _ = spread([x_BlNH], [Lane(sharding=sharding, heads=heads)], group, x_BlNH.new_empty(0))
    return x_BLnH


def tokens_from_heads(
    x_BLnH: Tensor, *, sharding: TokenSharding, heads: Partition, group: dist.ProcessGroup
) -> Tensor:
    """All tokens, my heads -> my tokens, all heads: the inverse of :func:`heads_from_tokens`, and its adjoint.

    Args, Raises: as there, for ``x_BLnH``: (B, L, n, H), or (L, B, n, H).

    Returns:
        ``x_BlNH``: (B, l, N, H), or (l, B, N, H).
    """
    check_lane(sharding, heads, group)
    rank = group.rank()
    wanted = (*sharding.global_shape, heads.sizes[rank])
    if x_BLnH.ndim != 4 or tuple(x_BLnH.shape[:3]) != wanted:
        raise ValueError(
            f"rank {rank} has a tensor of shape {tuple(x_BLnH.shape)}; all tokens of its heads are {(*wanted, 'H')} "
            f"in order {sharding.order!r}, as heads_from_tokens gives them"
        )
    return collect(x_BLnH, Lane(sharding=sharding, heads=heads), group)


def spread(
    tensors: Sequence[Tensor], lanes: Sequence[Lane], group: dist.ProcessGroup, header: Tensor
) -> tuple[list[Tensor], Tensor]:
    """:func:`heads_from_tokens` of several tensors of one dtype in one collective, with a header for each rank.

    Args:
        tensors: (B, l, heads.total, H) of each lane.
        lanes: how each travels.
        header: flat, of the tensors' dtype, the same to every rank; may be empty.

    Returns:
        (B, L, heads of this rank, H) of each lane, and the headers of all ranks, end to end. Nothing is checked.
    """
    rank, ranks = group.rank(), range(group.size())
    split = [x.split(lane.heads.sizes, dim=2) for x, lane in zip(tensors, lanes, strict=True)]
    sent = [[header, *(parts[to].flatten() for parts in split)] for to in ranks]
    shapes = [
        (*lane.sharding.local_shape(source), lane.heads.sizes[rank], x.shape[3])
        for source in ranks
        for x, lane in zip(tensors, lanes, strict=True)
    ]
    sizes = [prod(shape) for shape in shapes]
    per_rank = [[header.numel(), *sizes[i : i + len(lanes)]] for i in range(0, len(sizes), len(lanes))]
    received = trade(sent, per_rank, group)
    parts = [part.view(shape) for part, shape in zip((p for got in received for p in got[1:]), shapes, strict=True)]
    whole = [lane.sharding.unshard(parts[i :: len(lanes)]) for i, lane in enumerate(lanes)]
    return whole, torch.cat([got[0] for got in received])


def collect(x_BLnH: Tensor, lane: Lane, group: dist.ProcessGroup) -> Tensor:
    """:func:`tokens_from_heads`. Nothing is checked."""
    rank, ranks = group.rank(), range(group.size())
    sent = [[lane.sharding.shard(x_BLnH, to).flatten()] for to in ranks]
    shapes = [(*lane.sharding.local_shape(rank), lane.heads.sizes[source], x_BLnH.shape[3]) for source in ranks]
    received = trade(sent, [[prod(shape)] for shape in shapes], group)
    return torch.cat([part.view(shape) for (part,), shape in zip(received, shapes, strict=True)], dim=2)


def trade(
    sent: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]], group: dist.ProcessGroup
) -> list[tuple[Tensor, ...]]:
    """Send some flat tensors to each rank, receive flat tensors of these ``sizes`` from each. One collective."""
    # In two dimensions: the gradient of a cat of (0,) pieces is fresh zeros, behind which compiled code, and a
    # gradient of a gradient, would drop this rank's part of the exchange.
    buffer = exchange_rows(
        torch.cat([x.unsqueeze(1) for to_one in sent for x in to_one]),
        [sum(x.numel() for x in to_one) for to_one in sent],
        [sum(from_one) for from_one in sizes],
        group,
    ).squeeze(1)
    from_each = buffer.split([sum(from_one) for from_one in sizes])
    return [part.split(list(from_one)) for part, from_one in zip(from_each, sizes, strict=True)]


def check_lane(sharding: TokenSharding, heads: Partition, group: dist.ProcessGroup) -> None:
    """What every rank can see: ValueError on all of them, before any collective."""
    check_group(group, sharding.num_ranks, "the token sharding")
    check_group(group, len(heads), "the partition of heads")
    if len(sharding.batch) != 1:
        raise ValueError(
            f"the batch is cut into {sharding.batch.sizes}, but attention needs each rank to hold a part of every "
            "sequence; describe the one row of the mesh that this group is: batch=<its rows>, an int"
        )
    sharding.check_whole("attention")
