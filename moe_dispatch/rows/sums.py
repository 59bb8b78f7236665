"""Sums over rows: gather, weigh and add in one pass, in float32 and without a float32 copy of the rows (float16 rows
with weights are copied: their weights have no exact parts).

``embedding_bag`` does it, low precision in float32 registers, in a fixed order on CPU and CUDA, and rounds once. The
kernels of ``fused`` do it where they run: they read rows as vectors, and rows that are not dense.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fused.choice import launched, runs_fused

# Products of rows are made in pieces of about this many values: the cache of a core, or enough to fill a GPU.
VALUES_AT_ONCE_CPU = 2**18
VALUES_AT_ONCE = 2**24
SUMMED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what embedding_bag takes
BFLOAT16_PARTS = 3  # three of 8 bits hold the 24 bits of a float32


def take_rows(rows_ND: Tensor, row_of_M: Tensor, out: Tensor | None = None) -> Tensor:
    """(M, D): rows ``row_of_M``; zeros where there are no rows to take."""
    if not rows_ND.shape[0]:
        return out.zero_() if out is not None else rows_ND.new_zeros(len(row_of_M), rows_ND.shape[1])
    return torch.index_select(rows_ND, 0, row_of_M, out=out)


def sum_rows(rows_ND: Tensor, row_of_entry: Tensor, first_entry: Tensor) -> Tensor:
    """(len(first_entry), D): sums of consecutive entries' rows, each from its ``first_entry`` to the next; 0 where
    there is none."""
    if runs_fused(rows_ND, row_of_entry):
        return launched().sums(with_dense_rows(rows_ND), row_of_entry, first_entry)
    return F.embedding_bag(row_of_entry, rows_ND.detach(), first_entry, mode="sum")


def sum_weighted_rows(rows_ND: Tensor, weight_N: Tensor, row_of_entry: Tensor, first_entry: Tensor) -> Tensor:
    """:func:`sum_rows` with entry i times ``weight_N[i]``, in float32 (float64 for float64); in the dtype of the
    rows.

    Low-precision rows want weights of their own dtype: a bfloat16 row is taken with three bfloat16 parts of its
    weight, whose sum is the float32 weight and whose products are exact. There an Inf in a row or a weight gives NaN.
    The fused kernel rounds each product to float32 instead.
    """
    if runs_fused(rows_ND, row_of_entry):
        weight_N = weight_N.to(torch.promote_types(rows_ND.dtype, torch.float32)).contiguous()
        return launched().sums(with_dense_rows(rows_ND), row_of_entry, first_entry, weight_N)
    if rows_ND.dtype == torch.bfloat16:
        parts_NP = _bfloat16_parts(weight_N.to(torch.float32))
        entry = row_of_entry.repeat_interleave(BFLOAT16_PARTS, output_size=BFLOAT16_PARTS * len(row_of_entry))
        return _sum_weighted(rows_ND, parts_NP.flatten(), entry, first_entry * BFLOAT16_PARTS)
    dtype = torch.promote_types(rows_ND.dtype, torch.float32)
    return _sum_weighted(rows_ND.to(dtype), weight_N.to(dtype), row_of_entry, first_entry).to(rows_ND.dtype)


def weigh_rows(rows_RD: Tensor, weight_N: Tensor, row_of_N: Tensor) -> Tensor:
    """(N, D): rows ``row_of_N``, each times its weight, as :func:`sum_weighted_rows` of one row each."""
    return sum_weighted_rows(rows_RD, weight_N, row_of_N, torch.arange(len(row_of_N), device=row_of_N.device))


def dot_rows(a_ND: Tensor, b_RD: Tensor, row_of_b_N: Tensor) -> Tensor:
    """(N,): the products of ``a_ND[i]`` and ``b_RD[row_of_b_N[i]]``, summed in float32 (float64 for float64)."""
    dtype = torch.promote_types(a_ND.dtype, torch.float32)
    if runs_fused(a_ND, b_RD):
        return launched().dots(a_ND.contiguous(), with_dense_rows(b_RD), row_of_b_N, dtype)
    at_once = VALUES_AT_ONCE_CPU if a_ND.device.type == "cpu" else VALUES_AT_ONCE
    out_N = torch.empty(len(a_ND), dtype=dtype, device=a_ND.device)
    rows = max(at_once // max(a_ND.shape[1], 1), 1)
    for out, a, row_of_b in zip(out_N.split(rows), a_ND.split(rows), row_of_b_N.split(rows), strict=True):
        product = b_RD.index_select(0, row_of_b).to(dtype).mul_(a)
        torch.sum(product, 1, out=out)
    return out_N


def with_dense_rows(rows_ND: Tensor) -> Tensor:
    """The same, each row in one piece; a copy where it was not."""
    return rows_ND if rows_ND.stride(1) == 1 else rows_ND.clone(memory_format=torch.contiguous_format)


def _sum_weighted(rows_ND: Tensor, weight_N: Tensor, row_of_entry: Tensor, first_entry: Tensor) -> Tensor:
    # Detached, as all that is summed here has a backward by hand: else it would prepare one of its own.
    return F.embedding_bag(
        row_of_entry, rows_ND.detach(), first_entry, mode="sum", per_sample_weights=weight_N.detach()
    )


def _bfloat16_parts(weight_N: Tensor) -> Tensor:
    """(N, parts): bfloat16 numbers whose sums are these float32 numbers."""
    parts_NP, rest_N = weight_N.new_empty(len(weight_N), BFLOAT16_PARTS, dtype=torch.bfloat16), weight_N
    for part_N in parts_NP.unbind(1)[:-1]:
        part_N.copy_(rest_N)
        rest_N = rest_N - part_N
    parts_NP[:, -1] = rest_N
    return parts_NP
