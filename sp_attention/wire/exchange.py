"""Exchange tokens for heads and back: my tokens with all heads <-> all tokens with my heads.

The two directions are each other's adjoint, so each is the backward of the other, with the same splits. Nothing is
padded: messages have the real lengths. Each value is copied once before the collective and once after it; what stays
on its rank is copied once. A rank without tokens or heads takes part in every collective.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.internals import check_group, unseen_by_policies

from .headers import as_heads, header_backward, keep_for_recomputation, no_header
from .splits import Split, parts_to_heads, parts_to_tokens
from .tensors import Cut, exchange_tensors


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
        ValueError: a sharding or partition of another number of ranks, on every rank. A shape that is not this
            rank's shard with N heads: on this rank only, because its peers cannot see it.

    Source: DeepSpeed-Ulysses (arXiv:2309.14509).
    """
    check_split(sharding, heads, group)
    rank = group.rank()
    wanted = (*sharding.local_shape(rank), heads.total)
    if x_BlNH.ndim != 4 or tuple(x_BlNH.shape[:3]) != wanted:
        raise ValueError(
            f"rank {rank} has a tensor of shape {tuple(x_BlNH.shape)}; its tokens with all heads are "
            f"{(*wanted, 'H')} in order {sharding.order!r}, as sharding.shard(x, {rank}) cuts them"
        )
    (x_BLnH,), _ = to_heads([x_BlNH], [Split(sharding=sharding, heads=heads)], group, no_header(x_BlNH))
    return x_BLnH


def tokens_from_heads(
    x_BLnH: Tensor, *, sharding: TokenSharding, heads: Partition, group: dist.ProcessGroup
) -> Tensor:
    """All tokens, my heads -> my tokens, all heads: the inverse of :func:`heads_from_tokens`, and its adjoint.

    Args, Raises: as there, for ``x_BLnH``: (B, L, n, H), or (L, B, n, H).

    Returns:
        ``x_BlNH``: (B, l, N, H), or (l, B, N, H).
    """
    check_split(sharding, heads, group)
    rank = group.rank()
    wanted = (*sharding.global_shape, heads.sizes[rank])
    if x_BLnH.ndim != 4 or tuple(x_BLnH.shape[:3]) != wanted:
        raise ValueError(
            f"rank {rank} has a tensor of shape {tuple(x_BLnH.shape)}; all tokens of its heads are {(*wanted, 'H')} "
            f"in order {sharding.order!r}, as heads_from_tokens gives them"
        )
    x_BlNH, _ = to_tokens(x_BLnH, Split(sharding=sharding, heads=heads), group, no_header(x_BLnH))
    return x_BlNH


class _ToHeads(torch.autograd.Function):
    """forward   whole tensors of my heads, and all headers = S (my tokens' tensors)
    backward  d tensors = Sᵀ (d whole tensors), which is _ToTokens without a header
    """

    @staticmethod
    @unseen_by_policies
    def forward(
        ctx: Any, splits: tuple[Split, ...], group: dist.ProcessGroup, header: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.splits, ctx.group = splits, group
        rank = group.rank()
        wholes = [
            x.new_empty(*split.sharding.global_shape, split.heads.sizes[rank], x.shape[3])
            for x, split in zip(tensors, splits, strict=True)
        ]
        headers = header.new_empty(group.size(), len(header))
        sent, received = parts_to_heads(splits, rank)
        exchange_tensors(Cut([as_heads(header), *tensors], sent), Cut([as_heads(headers), *wholes], received), group)
        ctx.mark_non_differentiable(headers)
        keep_for_recomputation(ctx, headers)
        return (*wholes, headers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (
            None,
            None,
            None,
            *_ToTokens.apply(ctx.splits, ctx.group, header_backward(ctx, grads[0]), *grads[:-1])[:-1],
        )  # type: ignore[index]


class _ToTokens(torch.autograd.Function):
    """forward   my tokens of all heads, and all headers = Sᵀ (whole tensors of my heads)
    backward  d whole tensors = S (d tensors), which is _ToHeads without a header
    """

    @staticmethod
    @unseen_by_policies
    def forward(
        ctx: Any, splits: tuple[Split, ...], group: dist.ProcessGroup, header: Tensor, *wholes: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.splits, ctx.group = splits, group
        rank = group.rank()
        tensors = [
            x.new_empty(*split.sharding.local_shape(rank), split.heads.total, x.shape[3])
            for x, split in zip(wholes, splits, strict=True)
        ]
        headers = header.new_empty(group.size(), len(header))
        sent, received = parts_to_tokens(splits, rank)
        exchange_tensors(Cut([as_heads(header), *wholes], sent), Cut([as_heads(headers), *tensors], received), group)
        ctx.mark_non_differentiable(headers)
        keep_for_recomputation(ctx, headers)
        return (*tensors, headers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (
            None,
            None,
            None,
            *_ToHeads.apply(ctx.splits, ctx.group, header_backward(ctx, grads[0]), *grads[:-1])[:-1],
        )  # type: ignore[index]


def to_heads(
    tensors: Sequence[Tensor], splits: Sequence[Split], group: dist.ProcessGroup, header: Tensor
) -> tuple[list[Tensor], Tensor]:
    """:func:`heads_from_tokens` of several tensors of one dtype in one collective, with a header to every rank.

    Args:
        tensors: (B, l, heads.total, H) each; in the order of their shardings.
        splits: of each tensor.
        header: flat, of the tensors' dtype, the same to every rank; may be empty.

    Returns:
        (B, L, heads of this rank, H) of each tensor, and the headers of all ranks, (ranks, length). Nothing is
        checked.
    """
    *wholes, headers = _ToHeads.apply(tuple(splits), group, header, *tensors)  # type: ignore[misc]
    return wholes, headers


def to_tokens(x_BLnH: Tensor, split: Split, group: dist.ProcessGroup, header: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`tokens_from_heads` with a header to every rank; gives the headers of all ranks too, as
    :func:`to_heads`."""
    x_BlNH, headers = _ToTokens.apply((split,), group, header, x_BLnH)  # type: ignore[misc]
    return x_BlNH, headers


def check_split(sharding: TokenSharding, heads: Partition, group: dist.ProcessGroup) -> None:
    """Raise ValueError for what every rank can see. No communication."""
    check_sharding(sharding, group)
    check_group(group, len(heads), "the partition of heads")


def check_sharding(sharding: TokenSharding, group: dist.ProcessGroup) -> None:
    """Raise ValueError unless each rank of ``group`` holds a part of every sequence, and together they hold all of
    it. No communication."""
    if not isinstance(sharding, TokenSharding):
        raise ValueError(f"sharding is {sharding!r}; pass the TokenSharding that says which tokens each rank holds")
    check_group(group, sharding.num_ranks, "the token sharding")
    if len(sharding.batch) != 1:
        raise ValueError(
            f"the batch is cut into {sharding.batch.sizes}, but attention needs each rank to hold a part of every "
            "sequence; describe the one row of the mesh that this group is: batch=<its rows>, an int"
        )
    sharding.check_whole("attention")
