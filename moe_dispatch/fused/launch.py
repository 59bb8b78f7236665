"""The kernels, launched on tensors. Needs triton.

Rows may be narrower than their pitch: parts of the rows of a buffer.
"""

from collections.abc import Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .vectors import values_at_once

MOST_VALUES = 1024  # of a row, for one program at a time: 4 warps, of which each thread has 8
INDICES = 512  # for one program: 4 warps, of which each thread has 4
OPTIONS = MappingProxyType({"enable_fp_fusion": False})  # a product is rounded before it is added, in every version


def pack(parts: Sequence[Tensor], row_of_N: Tensor, out_NC: Tensor) -> None:
    """Rows ``row_of_N`` of up to four tensors side by side in the first columns of ``out_NC``; all of one dtype."""
    wide, *narrow = parts
    vector = values_at_once(wide, wide.shape[1], wide.stride(0), out_NC.stride(0))
    absent = 3 - len(narrow)
    widths = [part.shape[1] for part in narrow] + [0] * absent
    beside: Any = chain(*((part, part.stride(0)) for part in [*narrow, *[wide] * absent]))
    with torch.cuda.device_of(out_NC):
        if len(row_of_N):
            kernels.pack[(len(row_of_N),)](
                row_of_N.contiguous(),
                out_NC,
                out_NC.stride(0) // vector,
                wide,
                wide.shape[1] // vector,
                wide.stride(0) // vector,
                *beside,
                **_constants(VECTOR=vector, BLOCK=_block(wide.shape[1]), A=widths[0], B=widths[1], C=widths[2]),
            )


def expand(buffer_NC: Tensor, width: int, row_of_M: Tensor, column_of_M: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """(M, width) the first columns of rows ``row_of_M``, and (M, units) what stands ``column_of_M`` times ``units``
    columns behind them."""
    vector = values_at_once(buffer_NC, width, buffer_NC.stride(0))
    out_MC, value_MU = (buffer_NC.new_empty(len(row_of_M), size) for size in (width, units))
    with torch.cuda.device_of(buffer_NC):
        if len(row_of_M):
            kernels.expand[(len(row_of_M),)](
                buffer_NC,
                buffer_NC.stride(0) // vector,
                row_of_M.contiguous(),
                out_MC,
                width // vector,
                column_of_M.contiguous(),
                value_MU,
                **_constants(VECTOR=vector, BLOCK=_block(width), UNITS=units),
            )
    return out_MC, value_MU


def sums(rows_ND: Tensor, row_of_entry: Tensor, first_entry: Tensor, weight_of_entry: Tensor | None = None) -> Tensor:
    """(len(first_entry), D): see ``sums.sum_rows`` and ``sums.sum_weighted_rows``."""
    width = rows_ND.shape[1]
    vector, block = values_at_once(rows_ND, width, rows_ND.stride(0)), _block(width)
    out_TD = rows_ND.new_empty(len(first_entry), width)
    with torch.cuda.device_of(rows_ND):
        if out_TD.numel():
            kernels.sums[(len(out_TD), -(-width // block))](
                rows_ND,
                rows_ND.stride(0) // vector,
                rows_ND if weight_of_entry is None else weight_of_entry,
                row_of_entry.contiguous(),
                first_entry.contiguous(),
                len(row_of_entry),
                len(first_entry),
                out_TD,
                width // vector,
                **_constants(VECTOR=vector, BLOCK=block, WEIGHTED=weight_of_entry is not None),
            )
    return out_TD


def dots(a_ND: Tensor, b_RD: Tensor, row_of_b_N: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,) in ``dtype``: see ``sums.dot_rows``. ``a_ND`` is dense."""
    width = a_ND.shape[1]
    vector = values_at_once(b_RD, width, b_RD.stride(0))
    out_N = a_ND.new_empty(len(a_ND), dtype=dtype)
    with torch.cuda.device_of(a_ND):
        if len(out_N):
            kernels.dots[(len(out_N),)](
                a_ND,
                b_RD,
                b_RD.stride(0) // vector,
                row_of_b_N.contiguous(),
                out_N,
                width // vector,
                **_constants(VECTOR=vector, BLOCK=_block(width)),
            )
    return out_N


def entries(
    flat_M: Tensor,
    mine_GK: Tensor,
    token_of_source: Tensor,
    received_of_source: Tensor,
    num_choices: int,
    num_tokens: int,
    told_3M: Tensor,
) -> Tensor:
    """(M,) the key of each entry, as ``Entries.of`` has it, which also writes ``told_3M``; all int64."""
    key_M = torch.empty_like(flat_M, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(flat_M):
        if len(flat_M):
            kernels.entries[_programs(flat_M)](
                flat_M.contiguous(),
                mine_GK.contiguous(),
                token_of_source.contiguous(),
                received_of_source.contiguous(),
                len(flat_M),
                num_choices,
                num_tokens,
                key_M,
                told_3M[0],
                told_3M[1],
                told_3M[2],
                **_constants(BLOCK=INDICES),
            )
    return key_M


def reorder(entry_of_row_M: Tensor, told_3M: Tensor) -> tuple[Tensor, Tensor]:
    """(3, M), which is dense, in the order of the rows, and (M,) the row of each entry; all int64."""
    out_3M, row_of_entry_M = torch.empty_like(told_3M), torch.empty_like(entry_of_row_M)
    with torch.cuda.device_of(entry_of_row_M):
        if len(entry_of_row_M):
            kernels.reorder[_programs(entry_of_row_M)](
                entry_of_row_M,
                told_3M[0],
                told_3M[1],
                told_3M[2],
                len(entry_of_row_M),
                out_3M[0],
                out_3M[1],
                out_3M[2],
                row_of_entry_M,
                **_constants(BLOCK=INDICES),
            )
    return out_3M, row_of_entry_M


def _programs(x_M: Tensor) -> tuple[int]:
    return (-(-len(x_M) // INDICES),)


def _constants(**values: int) -> dict[str, Any]:
    return {**values, **OPTIONS}


def _block(width: int) -> int:
    """A power of two that holds the width, or as many values as one program has."""
    return min(MOST_VALUES, 1 << max(width - 1, 0).bit_length())
