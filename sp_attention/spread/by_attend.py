"""Rows to where an ``attend`` of the caller's works, and its output home, under autograd. Each way is the adjoint of
the other."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dispatch.internals import check_memory, unseen_by_policies

from ..dtypes import dtype_of_sums
from ..work.plan import RankWork
from .moves import Moves, Part


def tensors_to_work(mine: RankWork, group: dist.ProcessGroup, q_BlNH: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
    """My tokens of q and of what travels for keys, all heads -> the rows that I work on, my heads. One collective;
    one in backward."""
    return _ToWork.apply(mine, group, q_BlNH, *keys)  # type: ignore[return-value]


def output_home(mine: RankWork, group: dist.ProcessGroup, out_BLnH: Tensor, q_BlNH: Tensor) -> Tensor:
    """The output of the queries that I worked on, my heads -> that of my tokens, all heads. A collective where
    queries travel; one in backward.

    Args:
        q_BlNH: this rank's queries, for the shape.
    """
    if mine.query_turns[0].is_home:
        return out_BLnH
    return _Home.apply(mine, group, q_BlNH.shape[1], out_BLnH)  # type: ignore[return-value]


class _ToWork(torch.autograd.Function):
    @staticmethod
    @unseen_by_policies
    def forward(ctx: Any, mine: RankWork, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.mine, ctx.group, ctx.shapes = mine, group, [x.shape for x in tensors]
        (arrived,) = Moves(mine, group).arrivals(tensors[:1], tensors[1:])
        # An output that is an input has to be another object.
        return *(x.view_as(x) for x in arrived.queries), *arrived.keys

    @staticmethod
    @once_differentiable
    @unseen_by_policies
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_memory(*grads)
        moves, dtype = Moves(ctx.mine, ctx.group), dtype_of_sums(grads[0])
        homes = [grads[0].new_zeros(shape, dtype=dtype) for shape in ctx.shapes]
        parts = [Part(moves.keys, 0, grads[1:], homes[1:])]
        if ctx.mine.query_turns[0].is_home:
            homes[0] = grads[0]
        else:
            parts.append(Part(moves.queries, 0, grads[:1], homes[:1]))
        moves.start_home(parts).add()
        return None, None, *(home.to(grads[0].dtype) for home in homes)


class _Home(torch.autograd.Function):
    @staticmethod
    @unseen_by_policies
    def forward(ctx: Any, mine: RankWork, group: dist.ProcessGroup, length: int, out_BLnH: Tensor) -> Tensor:
        ctx.mine, ctx.group = mine, group
        heads = mine.work.heads.query.total
        out_BlNH = out_BLnH.new_empty(out_BLnH.shape[0], length, heads, out_BLnH.shape[3])
        moves = Moves(mine, group)
        moves.start_home([Part(moves.queries, 0, [out_BLnH], [out_BlNH])]).fill()
        return out_BlNH

    @staticmethod
    @once_differentiable
    @unseen_by_policies
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_memory(*grads)
        (arrived,) = Moves(ctx.mine, ctx.group).arrivals([grads[0]], [])
        return None, None, None, arrived.queries[0]
