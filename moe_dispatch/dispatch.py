"""Moving rows by a plan: float rows only, no arithmetic on indices.

Dispatch is a linear map A and combine is its adjoint, so the backward of each is the other, and neither keeps a row
for it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .exchange import exchange_rows
from .metadata import DispatchMetadata


class _Dispatch(torch.autograd.Function):
    """forward   x_MD, weight_M       = A x_tD, A weight_tK
    backward  d x_tD, d weight_tK  = Aᵀ d x_MD, Aᵀ d weight_M
    """

    @staticmethod
    def forward(ctx: Any, x_tD: Tensor, weight_tK: Tensor, metadata: DispatchMetadata) -> tuple[Tensor, Tensor]:
        ctx.plan = metadata
        return _expand(x_tD, weight_tK, metadata)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_x_MD, grad_weight_M = grads
        metadata: DispatchMetadata = ctx.plan
        grad_weight_RK = grad_weight_M.new_zeros(sum(metadata.rows_received), metadata.expert_BlK.shape[2])
        grad_weight_RK[metadata.received_of_row_M, metadata.choice_of_row_M] = grad_weight_M
        grad_x_RD = sum_rows(grad_x_MD, metadata.row_of_entry_M, metadata.first_entry_R)
        grad_x_tD, grad_weight_tK = _return(grad_x_RD, grad_weight_RK, metadata=metadata)
        return grad_x_tD, grad_weight_tK, None


class _Combine(torch.autograd.Function):
    """forward   y_tD    = Aᵀ y_MD
    backward  d y_MD  = A d y_tD
    """

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, metadata: DispatchMetadata, wire_dtype: torch.dtype) -> Tensor:
        ctx.plan, ctx.dtype = metadata, y_MD.dtype
        y_RD = sum_rows(y_MD, metadata.row_of_entry_M, metadata.first_entry_R).to(wire_dtype)
        return _return(y_RD, metadata=metadata)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_y_tD,) = grads
        no_weights_t0 = grad_y_tD.new_empty(len(grad_y_tD), 0)
        grad_y_MD, _ = _expand(grad_y_tD, no_weights_t0, ctx.plan)
        return grad_y_MD.to(ctx.dtype), None, None


def dispatch(x_BlD: Tensor, weight_BlK: Tensor, metadata: DispatchMetadata) -> tuple[Tensor, Tensor]:
    """Bring each token's row, with its routing weights, to the experts it chose. One collective; one more in
    backward.

    A token crosses to a rank once, however many of its experts live there, and is copied there.

    Args:
        x_BlD: ``metadata.local_shape``, this rank's tokens.
        weight_BlK: (b, l, K), or (l, b, K), the weight of each choice; its dtype may differ from that of ``x_BlD``.
        metadata: the plan of these tokens.

    Returns:
        ``x_MD`` (M, D) and ``weight_M`` (M,): one row per choice that fell on an expert of this rank, by expert, then
        global token, then choice; ``metadata.rows_per_expert_e`` says how many each expert got.

    The gradient of a token is the sum over its rows, taken in float32 (float64 for float64) and rounded to the rows'
    dtype once for the wire and once for the result.

    Raises:
        ValueError: a shape or dtype that does not fit the plan. Only this rank can see it, so it is raised here and
            not on its peers: pass ``weight_BlK`` to :func:`plan_dispatch`, and check the rest where all ranks take
            the same path.
    """
    if tuple(x_BlD.shape) != metadata.local_shape or not x_BlD.is_floating_point():
        raise ValueError(
            f"rank {metadata.rank}: x is {tuple(x_BlD.shape)} of {x_BlD.dtype}, but the plan was made for "
            f"{metadata.local_shape}; pass the floating-point tokens that the plan's expert ids belong to"
        )
    if weight_BlK.shape != metadata.expert_BlK.shape or not weight_BlK.is_floating_point():
        raise ValueError(
            f"rank {metadata.rank}: weights are {tuple(weight_BlK.shape)} of {weight_BlK.dtype}, but the plan was "
            f"made from ids of shape {tuple(metadata.expert_BlK.shape)}; each choice needs one floating-point weight"
        )
    return _Dispatch.apply(x_BlD.flatten(0, 1), weight_BlK.flatten(0, 1), metadata)  # type: ignore[return-value]


def combine(y_MD: Tensor, metadata: DispatchMetadata, weight_M: Tensor | None = None) -> Tensor:
    """Sum each token's rows, where they were computed and then over ranks, back on the token's rank. One collective;
    one in backward.

    Args:
        y_MD: (M, any width), one result per row of :func:`dispatch`.
        metadata: the plan of that dispatch.
        weight_M: (M,) multiplies the rows, in float32. Leave it out where the experts have applied the weights
            already.

    Returns:
        ``y_BlD``: (b, l, width), or (l, b, width), in the dtype of ``y_MD``; 0 for a token without experts. Sums are
            taken in float32
        (float64 for float64), and rounded once for the wire and once for the result.

    Raises:
        ValueError: a number of rows or weights that is not the plan's.
    """
    num_rows = len(metadata.token_of_row_M)
    if y_MD.ndim != 2 or len(y_MD) != num_rows or not y_MD.is_floating_point():
        raise ValueError(
            f"rank {metadata.rank}: y is {tuple(y_MD.shape)} of {y_MD.dtype}, but the plan has {num_rows} rows; "
            "pass one floating-point row per row of dispatch, in its order"
        )
    rows_MD = y_MD
    if weight_M is not None:
        if tuple(weight_M.shape) != (num_rows,):
            raise ValueError(
                f"rank {metadata.rank}: weight_M is {tuple(weight_M.shape)}, but the plan has {num_rows} rows; pass "
                "the weight_M of dispatch"
            )
        sum_dtype = torch.promote_types(y_MD.dtype, torch.float32)
        rows_MD = y_MD.to(sum_dtype) * weight_M.to(sum_dtype).unsqueeze(1)
    y_tD: Tensor = _Combine.apply(rows_MD, metadata, y_MD.dtype)  # type: ignore[assignment]
    return y_tD.unflatten(0, metadata.local_shape[:2])


def sum_rows(rows_ND: Tensor, row_of_entry: Tensor, first_entry: Tensor) -> Tensor:
    """(len(first_entry), D): sums of consecutive entries' rows, each from its ``first_entry`` to the next; 0 where
    there is none.

    One pass without a float32 copy: ``embedding_bag`` gathers and sums, low precision in float32 registers, and
    rounds once.
    """
    return F.embedding_bag(row_of_entry, rows_ND, first_entry, mode="sum")


def _expand(x_tD: Tensor, weight_tK: Tensor, metadata: DispatchMetadata) -> tuple[Tensor, Tensor]:
    """A: each token's row once to every rank that needs it, and there one copy per choice. No weights where K is
    0."""
    payload_SC = _pack(x_tD, weight_tK).index_select(0, metadata.token_of_sent_S)
    payload_RC = exchange_rows(payload_SC, metadata.rows_sent, metadata.rows_received, metadata.group)
    row_bytes = x_tD.shape[1] * x_tD.itemsize
    x_MD = payload_RC[:, :row_bytes].index_select(0, metadata.received_of_row_M).view(x_tD.dtype)
    if not weight_tK.shape[1]:
        return x_MD, weight_tK.new_empty(0)
    weight_RK = _unpack(payload_RC, weight_tK, row_bytes)
    return x_MD, weight_RK[metadata.received_of_row_M, metadata.choice_of_row_M]


def _return(*row_tensors_R: Tensor, metadata: DispatchMetadata) -> Sequence[Tensor]:
    """The rest of Aᵀ: received rows back to their tokens' ranks, in one payload, and summed there."""
    payload_SC = exchange_rows(_pack(*row_tensors_R), metadata.rows_received, metadata.rows_sent, metadata.group)
    sums, start = [], 0
    for like_R in row_tensors_R:
        rows_S = _unpack(payload_SC, like_R, start)
        sums.append(sum_rows(rows_S, metadata.sent_of_entry_S, metadata.first_entry_t))
        start += like_R.shape[1] * like_R.itemsize
    return sums


def _pack(*row_tensors: Tensor) -> Tensor:
    """Tensors (N, width), of any dtypes, side by side as bytes: one collective moves them all."""
    # One row or column counts as contiguous with any stride, but only stride 1 can be viewed as bytes.
    dense = (
        rows if rows.stride(1) == 1 else rows.clone(memory_format=torch.contiguous_format) for rows in row_tensors
    )
    return torch.cat([rows.view(torch.uint8) for rows in dense], dim=1)


def _unpack(payload: Tensor, like: Tensor, start: int) -> Tensor:
    """The rows, in the width and dtype of ``like``, that start at byte ``start`` of each payload row."""
    rows = payload[:, start : start + like.shape[1] * like.itemsize]
    # A copy even of one row, which counts as contiguous: bytes at any offset cannot be viewed as a wider dtype.
    return rows.clone(memory_format=torch.contiguous_format).view(like.dtype)
