"""Rows of several tensors side by side in one buffer of bytes: one collective moves all.

A gather writes straight into the buffer before the exchange and reads straight out of it after. Rows are handled as
*units*, ints of the size of the narrowest dtype, at which any part of a row can start. There is nothing between the
parts. Behind the last there may be a few bytes that nobody fills or reads, so that each row starts where a GPU can
read a vector (:func:`row_bytes`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..fused.choice import launched, runs_fused
from ..fused.vectors import VECTOR_BYTES
from .sums import sum_rows, take_rows, with_dense_rows

LEAST_BYTES_PER_PADDED = 32  # padding is at most 3 % of a row: with 4120 or 8200 bytes it is 0.2 or 0.1 %


def row_bytes(*part_bytes: int) -> int:
    """From the start of a row to that of the next, for rows with these parts.

    A row of one part is as it is: its buffer is a dense tensor of the part's dtype. A narrow row would become
    noticeably longer, and has few vectors.
    """
    together = sum(part_bytes)
    padding = -together % VECTOR_BYTES
    return together + padding * (len(part_bytes) > 1 and padding * LEAST_BYTES_PER_PADDED <= together)


class RowFormat:
    """How the parts of a row lie side by side: rows of tensors like these, (N, width) of any dtypes."""

    def __init__(self, *like: Tensor) -> None:
        self._dtypes = [rows.dtype for rows in like]
        size = min(dtype.itemsize for dtype in self._dtypes)
        self._unit = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        part_bytes = [rows.shape[1] * rows.itemsize for rows in like]
        self._row_bytes = row_bytes(*part_bytes)
        self._widths = [width // size for width in part_bytes]

    def empty(self, num_rows: int, device: torch.device) -> Tensor:
        """(num_rows, bytes of a row), to be filled."""
        return torch.empty(num_rows, self._row_bytes, dtype=torch.uint8, device=device)

    def pack(self, *row_tensors_N: Tensor) -> Tensor:
        """(N, bytes of a row): the rows side by side."""
        buffer_NC = self.empty(len(row_tensors_N[0]), row_tensors_N[0].device)
        for part, rows in zip(self._split(buffer_NC), row_tensors_N, strict=True):
            part.copy_(self._as_units(rows))
        return buffer_NC

    def gather(self, row_of_N: Tensor, row_tensors: Sequence[Tensor], out: Tensor) -> None:
        """:meth:`pack` of rows ``row_of_N`` of the tensors into ``out``, (N, bytes of a row), in one pass."""
        if row_tensors[0].shape[0] and runs_fused(out, *row_tensors):  # else zeros, see take_rows
            parts = [with_dense_rows(self._as_units(rows)) for rows in row_tensors]
            launched().pack(parts, row_of_N, out.view(self._unit))
            return
        for part, rows in zip(self._split(out), row_tensors, strict=True):
            take_rows(self._as_units(rows), row_of_N, out=part)

    def read(self, buffer_NC: Tensor) -> list[Tensor]:
        """The parts, each in its dtype; a view where that is as wide as a unit."""
        return [self._as_rows(part, dtype) for part, dtype in zip(self._split(buffer_NC), self._dtypes, strict=True)]

    def read_part(self, buffer_NC: Tensor, part: int) -> Tensor:
        """One of the parts."""
        return self._as_rows(self._part(buffer_NC.view(self._unit), part), self._dtypes[part])

    def sum_part(self, buffer_SC: Tensor, part: int, row_of_entry: Tensor, first_entry: Tensor) -> Tensor:
        """:func:`sum_rows` of one part.

        ``embedding_bag`` copies rows that are not dense; the fused kernel does not. So where units are as wide as the
        part's dtype, whole rows are summed: the rest, nonsense as numbers of that dtype, stays in its columns, and is
        cut off.
        """
        dtype = self._dtypes[part]
        most_of_the_row = 2 * self._widths[part] >= sum(self._widths)
        strided = dtype.itemsize == self._unit.itemsize and runs_fused(buffer_SC)
        if strided or dtype.itemsize != self._unit.itemsize or not most_of_the_row:
            return sum_rows(self.read_part(buffer_SC, part), row_of_entry, first_entry)
        return self._part(sum_rows(buffer_SC.view(dtype), row_of_entry, first_entry), part)

    def read_rows(self, buffer_NC: Tensor, part: int, row_of_M: Tensor) -> Tensor:
        """Rows ``row_of_M`` of one part, in one pass."""
        return self._part(buffer_NC.view(self._unit), part).index_select(0, row_of_M).view(self._dtypes[part])

    def expand(self, buffer_NC: Tensor, row_of_M: Tensor, column_of_M: Tensor) -> tuple[Tensor, Tensor]:
        """(M, width) rows ``row_of_M`` of the first part, and (M,) of the second part the number in column
        ``column_of_M`` of that row."""
        if not runs_fused(buffer_NC):
            return self.read_rows(buffer_NC, 0, row_of_M), self.read_part(buffer_NC, 1)[row_of_M, column_of_M]
        units = self._dtypes[1].itemsize // self._unit.itemsize
        x_MU, value_MU = launched().expand(buffer_NC.view(self._unit), self._widths[0], row_of_M, column_of_M, units)
        return x_MU.view(self._dtypes[0]), value_MU.view(self._dtypes[1]).squeeze(1)

    def _split(self, buffer_NC: Tensor) -> tuple[Tensor, ...]:
        units_NC = buffer_NC.view(self._unit)
        return units_NC.narrow(1, 0, sum(self._widths)).split_with_sizes(self._widths, dim=1)

    def _part(self, units_NC: Tensor, part: int) -> Tensor:
        return units_NC.narrow(1, sum(self._widths[:part]), self._widths[part])

    def _as_units(self, rows: Tensor) -> Tensor:
        if rows.itemsize == self._unit.itemsize:
            return rows.view(self._unit)
        # One row or column counts as contiguous with any stride, but only stride 1 can be viewed as units.
        return with_dense_rows(rows).view(self._unit)

    def _as_rows(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype.itemsize == self._unit.itemsize:
            return part.view(dtype)
        return part.clone(memory_format=torch.contiguous_format).view(dtype)


@dataclass(frozen=True, slots=True)
class RowFormats:
    """Of rows with weights on the way to the experts, with what rides with them, and of their gradients home."""

    there: RowFormat
    home: RowFormat

    @classmethod
    def of(cls, x_tD: Tensor, weight_tK: Tensor, rides: Sequence[Tensor]) -> "RowFormats":
        home = RowFormat(x_tD, weight_tK)
        return cls(RowFormat(x_tD, weight_tK, *rides) if rides else home, home)
