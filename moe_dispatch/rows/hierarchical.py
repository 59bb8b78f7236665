"""Moving rows in two steps, first between nodes and then inside.

Dispatch is W B: B brings each token with its K weights to the nodes that need it, W is ``dispatch`` inside the node.
Combine is the adjoint, Bᵀ Wᵀ. A token crosses to a node once, and its outputs are summed in the node before one row
returns. As in ``dispatch.py``, no row is kept for backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..plan.counted import DispatchMetadata
from ..plan.hierarchical import HierarchicalPlan
from .buffer import Payload
from .dispatch import Flight, check_tokens, combine, dispatch
from .sums import sum_rows


class _ToNodes(torch.autograd.Function):
    """forward   x_RD, weight_RK      = B x_tD, B weight_tK
    backward  d x_tD, d weight_tK  = Bᵀ d x_RD, Bᵀ d weight_RK
    """

    @staticmethod
    def forward(ctx: Any, x_tD: Tensor, weight_tK: Tensor, between: DispatchMetadata) -> tuple[Tensor, Tensor]:
        ctx.flight, ctx.payload = Flight(between), Payload(x_tD, weight_tK)
        ctx.flight.depart(ctx.payload, x_tD, weight_tK)
        x_RD, weight_RK = ctx.payload.read(ctx.flight.land())
        return x_RD, weight_RK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        flight, between = ctx.flight, ctx.flight.plan
        flight.depart_home(ctx.payload.pack(*grads))
        buffer_SC = flight.land()
        grad_x_tD, grad_weight_tK = (
            ctx.payload.sum_part(buffer_SC, part, between.sent_of_entry_S, between.first_entry_t) for part in range(2)
        )
        return grad_x_tD, grad_weight_tK, None


class _FromNodes(torch.autograd.Function):
    """forward   y_tD    = Bᵀ y_RD
    backward  d y_RD  = B d y_tD
    """

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, between: DispatchMetadata) -> Tensor:
        ctx.flight, ctx.dtype = Flight(between), y_RD.dtype
        ctx.flight.depart_home(y_RD.contiguous())
        return sum_rows(ctx.flight.land(), between.sent_of_entry_S, between.first_entry_t)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.flight.depart(Payload(grads[0]), grads[0])
        return ctx.flight.land().view(ctx.dtype), None


def dispatch_hierarchical(x_BlD: Tensor, weight_BlK: Tensor, plan: HierarchicalPlan) -> tuple[Tensor, Tensor]:
    """Bring each token's row to the experts it chose: what :func:`dispatch` returns, bit for bit. One collective over
    the column and one over the node; as many in backward.

    Between nodes, a row travels once per (token, node), with its K weights.

    Args:
        x_BlD: ``plan.between.local_shape``, this rank's tokens.
        weight_BlK: (b, l, K), or (l, b, K), the weight of each choice; its dtype may differ from that of ``x_BlD``.
        plan: of these tokens.

    Returns:
        ``x_MD`` (M, D) and ``weight_M`` (M,), by expert, then global token, then choice.

    The gradient of a token is summed in each node and then over nodes, each time in float32 (float64 for float64) and
    rounded to the rows' dtype.

    Raises:
        ValueError: a shape or dtype that does not fit the plan; on this rank only, as in :func:`dispatch`.
    """
    between = plan.between
    check_tokens(x_BlD, weight_BlK, between, plan.nodes.rank)
    x_RD, weight_RK = _ToNodes.apply(x_BlD.flatten(0, 1), weight_BlK.flatten(0, 1), between)  # type: ignore[misc]
    return dispatch(x_RD.unsqueeze(0), weight_RK.unsqueeze(0), plan.within)


def combine_hierarchical(y_MD: Tensor, plan: HierarchicalPlan, weight_M: Tensor | None = None) -> Tensor:
    """Sum each token's rows: on their rank, then in their node, then over nodes. One collective over the node and one
    over the column; as many in backward.

    Args:
        y_MD: (M, any width), one result per row of :func:`dispatch_hierarchical`.
        plan: of that dispatch.
        weight_M: (M,) multiplies the rows, in float32, as in :func:`combine`.

    Returns:
        ``y_BlD``: (b, l, width), or (l, b, width), in the dtype of ``y_MD``; 0 for a token without experts. Each of
        the three sums is taken in float32 (float64 for float64) and rounded.

    Raises:
        ValueError: a number of rows or weights that is not the plan's.
    """
    y_1RD = combine(y_MD, plan.within, weight_M)
    y_tD: Tensor = _FromNodes.apply(y_1RD.squeeze(0), plan.between)  # type: ignore[assignment]
    return y_tD.unflatten(0, plan.between.local_shape[:2])
