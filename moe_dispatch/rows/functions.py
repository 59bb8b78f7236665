"""The autograd Functions that move rows by a plan: each dispatch and combine is two of them.

Dispatch is a linear map A and combine is its adjoint, so the backward of each is the other, and neither keeps a row
for it (a combine with weights keeps the rows that the weights multiply, for the weights' gradient).

The first half gathers and starts an exchange in the background, the second waits and copies or sums. What runs
between them overlaps with the exchange, and so does its backward with the exchange backward: autograd runs backward
in reverse order, so the second Function starts the exchange that the first awaits.

In two steps, A is W B: B brings each token with its K weights to the nodes that need it, W is a dispatch within the
node. Combine is the adjoint, Bᵀ Wᵀ.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..wire.policies import unseen_by_policies
from .buffer import RowFormat, RowFormats
from .row_exchange import RowExchange
from .sums import dot_rows, sum_rows, sum_weighted_rows, weigh_rows


class StartDispatch(torch.autograd.Function):
    """The half of A, and of its adjoint, on the tokens' rank. ``link`` is a number without meaning that ties the
    halves together in the graph.

    forward   send x_tD, weight_tK, and what rides with them, to the ranks that need them
    backward  d x_tD, d weight_tK = the sums of what came back
    """

    @staticmethod
    @unseen_by_policies
    def forward(ctx: Any, x_tD: Tensor, weight_tK: Tensor, exchange: RowExchange, formats: RowFormats) -> Tensor:
        ctx.exchange, ctx.row_format = exchange, formats.home
        exchange.start(formats.there, x_tD, weight_tK, *exchange.plan.row_index.rides)
        return x_tD.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        buffer_SC, plan = ctx.exchange.wait(), ctx.exchange.plan
        grad_x_tD, grad_weight_tK = (
            ctx.row_format.sum_part(buffer_SC, part, plan.sent_of_entry_S, plan.first_entry_t)[: plan.num_tokens]
            if needed
            else None
            for part, needed in enumerate(ctx.needs_input_grad[:2])
        )
        return grad_x_tD, grad_weight_tK, None, None


class FinishDispatch(torch.autograd.Function):
    """The half on the experts' rank.

    forward   x_MD, weight_M = one copy of what came for each choice, as what rode with it tells
    backward  send back the sums of d x_MD, and d weight_M in its token's row

    Saves an empty tensor: a checkpoint recomputes, and so dispatches again, on the ranks on which backward asks for
    something saved. So all of them do before the exchange of backward, whatever their experts save.
    """

    @staticmethod
    @unseen_by_policies
    def forward(ctx: Any, link: Tensor, exchange: RowExchange, formats: RowFormats) -> tuple[Tensor, Tensor]:
        ctx.exchange, ctx.row_format, plan = exchange, formats.home, exchange.plan
        ctx.save_for_backward(link.new_empty(0))
        buffer_RC, there = exchange.wait(), formats.there
        plan.row_index.came([there.read_part(buffer_RC, 2 + i) for i in range(len(plan.row_index.rides))])
        return there.expand(buffer_RC, plan.received_of_row_M, plan.choice_of_row_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _ = ctx.saved_tensors
        (grad_x_MD, grad_weight_M), plan = grads, ctx.exchange.plan
        grad_x_RD = sum_rows(grad_x_MD, plan.row_of_entry_M, plan.first_entry_R)[: plan.num_received]
        grad_weight_RK = grad_weight_M.new_zeros(plan.num_received + plan.spare, plan.expert_BlK.shape[2])
        grad_weight_RK[plan.received_of_row_M, plan.choice_of_row_M] = grad_weight_M
        ctx.exchange.start_home(ctx.row_format.pack(grad_x_RD, grad_weight_RK[: plan.num_received]))
        return grad_x_MD.new_zeros(()), None, None


class FinishBetween(torch.autograd.Function):
    """The half of a dispatch between nodes on the rank that the rows come to: B brings each token once.

    forward   x_RD, weight_RK = what came
    backward  send back d x_RD, d weight_RK
    """

    @staticmethod
    @unseen_by_policies
    def forward(ctx: Any, link: Tensor, exchange: RowExchange, formats: RowFormats) -> tuple[Tensor, Tensor]:
        ctx.exchange, ctx.row_format = exchange, formats.home
        x_RD, weight_RK = formats.there.read(exchange.wait())
        return x_RD, weight_RK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.exchange.start_home(ctx.row_format.pack(*grads))
        return grads[0].new_zeros(()), None, None


class StartCombine(torch.autograd.Function):
    """The half of the adjoint of A on the experts' rank.

    forward   send back the sums of y_MD of each token
    backward  d y_MD = one copy of what came for each choice
    """

    @staticmethod
    @unseen_by_policies
    def forward(ctx: Any, y_MD: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange, ctx.dtype, plan = exchange, y_MD.dtype, exchange.plan
        exchange.start_home(sum_rows(y_MD, plan.row_of_entry_M, plan.first_entry_R))
        return y_MD.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_RD = ctx.exchange.wait().view(ctx.dtype)
        return grad_RD.index_select(0, ctx.exchange.plan.received_of_row_M), None


class StartWeightedCombine(torch.autograd.Function):
    """forward   send back the sums of weight_M * y_MD of each token
    backward  d y_MD = weight_M * g_MD and d weight_M = <y_MD, g_MD>, with g_MD one copy of what came for each choice
    """

    @staticmethod
    @unseen_by_policies
    def forward(ctx: Any, y_MD: Tensor, weight_M: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange, ctx.dtype, plan = exchange, y_MD.dtype, exchange.plan
        ctx.save_for_backward(y_MD if ctx.needs_input_grad[1] else None, weight_M)
        weight_of_entry_M = weight_M[plan.row_of_entry_M]
        exchange.start_home(sum_weighted_rows(y_MD, weight_of_entry_M, plan.row_of_entry_M, plan.first_entry_R))
        return y_MD.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y_MD, weight_M = ctx.saved_tensors
        received_of_row_M = ctx.exchange.plan.received_of_row_M
        grad_RD = ctx.exchange.wait().view(ctx.dtype)
        grad_y_MD = grad_weight_M = None
        if ctx.needs_input_grad[0]:
            grad_y_MD = weigh_rows(grad_RD, weight_M, received_of_row_M)
        if ctx.needs_input_grad[1]:
            grad_weight_M = dot_rows(y_MD, grad_RD, received_of_row_M).to(weight_M.dtype)
        return grad_y_MD, grad_weight_M, None


class StartCombineBetween(torch.autograd.Function):
    """The half of a combine between nodes on the rank that the rows came to.

    forward   send back y_RD
    backward  d y_RD = what came
    """

    @staticmethod
    @unseen_by_policies
    def forward(ctx: Any, y_RD: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange, ctx.dtype = exchange, y_RD.dtype
        exchange.start_home(y_RD.contiguous())
        return y_RD.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.exchange.wait().view(ctx.dtype), None


class FinishCombine(torch.autograd.Function):
    """The half on the tokens' rank.

    forward   y_tD = the sums over ranks of what came back
    backward  send d y_tD to the ranks that sent
    """

    @staticmethod
    @unseen_by_policies
    def forward(ctx: Any, link: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange, plan = exchange, exchange.plan
        # Not a view of anything: autograd lets nobody write to a view that a Function returns (y_BlD += x_BlD).
        return plan.checked(sum_rows(exchange.wait(), plan.sent_of_entry_S, plan.first_entry_t))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_y_tD,) = grads
        ctx.exchange.start(RowFormat(grad_y_tD), grad_y_tD)
        return grad_y_tD.new_zeros(()), None
