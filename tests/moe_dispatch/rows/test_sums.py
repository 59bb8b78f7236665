"""Sums over rows against plain loops in float64, and row formats that give back the bits. One process."""

from itertools import product

import pytest
import torch
from torch import Tensor

from moe_dispatch.rows.buffer import RowFormat, row_bytes
from moe_dispatch.rows.sums import VALUES_AT_ONCE_CPU, dot_rows, sum_rows, sum_weighted_rows, weigh_rows

pytestmark = pytest.mark.usefixtures("uncovered")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Unit roundoff of the dtype that a result is rounded to; sums of at most 5 terms of order 1 in float32 add little.
ROUNDED = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
FIRST = torch.tensor([0, 3, 3, 5])  # runs of 3, 0, 2 and 5 entries
ENTRIES = torch.tensor([4, 0, 4, 1, 2, 6, 5, 3, 0, 1])


def rows_of(dtype: torch.dtype, width: int = 33) -> Tensor:
    return torch.randn(7, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def weights_of(dtype: torch.dtype, number: int) -> Tensor:
    return torch.rand(number, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def runs_summed(rows_ND: Tensor, weight_N: Tensor) -> Tensor:
    ends = [*FIRST.tolist()[1:], len(ENTRIES)]
    sums = torch.zeros(len(FIRST), rows_ND.shape[1], dtype=torch.float64)
    for run, (start, end) in enumerate(zip(FIRST.tolist(), ends, strict=True)):
        for entry in range(start, end):
            sums[run] += rows_ND[ENTRIES[entry]].double() * weight_N[entry].double()
    return sums


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_run_over_consecutive_entries(dtype: torch.dtype) -> None:
    rows_ND = rows_of(dtype)
    got, wanted = sum_rows(rows_ND, ENTRIES, FIRST), runs_summed(rows_ND, torch.ones(len(ENTRIES)))
    assert got.dtype == dtype
    assert ((got.double() - wanted).abs() <= ROUNDED[dtype] * wanted.abs() + 1e-6 * (dtype != torch.float64)).all()


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_keep_their_precision_until_the_one_rounding(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """A weight rounded to the rows' dtype would be off by as much again."""
    rows_ND, weight_N = rows_of(dtype), weights_of(weight_dtype, len(ENTRIES))
    rounded = weight_N if dtype == torch.float64 else weight_N.float()
    wanted = runs_summed(rows_ND, rounded)
    got = sum_weighted_rows(rows_ND, weight_N, ENTRIES, FIRST)
    assert got.dtype == dtype
    # One rounding, and the float32 sums' own error.
    assert ((got.double() - wanted).abs() <= ROUNDED[dtype] * wanted.abs() + 2e-6 * (dtype != torch.float64)).all()
    copies = weigh_rows(rows_ND, weight_N[:4], ENTRIES[:4])
    wanted = rows_ND[ENTRIES[:4]].double() * rounded[:4, None].double()
    assert ((copies.double() - wanted).abs() <= ROUNDED[dtype] * wanted.abs() + 1e-7 * (dtype != torch.float64)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_rows_are_not_rounded_to_their_dtype(dtype: torch.dtype) -> None:
    """More values than are multiplied at once, so that the pieces have to fit together."""
    width = VALUES_AT_ONCE_CPU // 3
    a_ND, b_RD = rows_of(dtype, width), rows_of(dtype, width).flip(0)
    row_of_b_N = torch.tensor([1, 1, 0, 6, 5, 2, 2])
    wanted = (a_ND.double() * b_RD[row_of_b_N].double()).sum(1)
    got = dot_rows(a_ND, b_RD, row_of_b_N)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Measured: 2e-7 of the largest in float32; products rounded to bfloat16 are off by 1e-3 of it.
    assert (got.double() - wanted).abs().max() <= (1e-13 if dtype == torch.float64 else 2e-6) * wanted.abs().max()


@pytest.mark.parametrize("widths", [(7, 3), (1, 1), (8, 2), (5, 8), (251, 3)])
@pytest.mark.parametrize("dtypes", list(product(DTYPES, DTYPES)), ids=str)
def test_a_row_format_gives_back_the_bits(dtypes: tuple[torch.dtype, torch.dtype], widths: tuple[int, int]) -> None:
    x_ND, w_NK = (rows_of(dtype, width) for dtype, width in zip(dtypes, widths, strict=True))
    transposed_ND = x_ND.T.contiguous().T
    row_format = RowFormat(x_ND, w_NK)
    for packed in (row_format.pack(x_ND, w_NK), row_format.pack(transposed_ND, w_NK)):
        assert packed.shape == (7, row_bytes(*(w * dtype.itemsize for w, dtype in zip(widths, dtypes, strict=True))))
        assert packed.dtype == torch.uint8
        assert all(map(torch.equal, row_format.read(packed), (x_ND, w_NK)))
    gathered = row_format.empty(len(ENTRIES), x_ND.device)
    row_format.gather(ENTRIES, (transposed_ND, w_NK), out=gathered)
    assert all(map(torch.equal, row_format.read(gathered), (x_ND[ENTRIES], w_NK[ENTRIES])))
    assert row_format.read_rows(gathered, 0, FIRST).equal(x_ND[ENTRIES][FIRST])
    for part, rows in enumerate((x_ND, w_NK)):
        assert row_format.sum_part(row_format.pack(x_ND, w_NK), part, ENTRIES, FIRST).equal(
            sum_rows(rows, ENTRIES, FIRST)
        )


@pytest.mark.parametrize(
    ("parts", "pitch"),
    [
        ((14336, 32), 14368),  # DeepSeek-V3 in bfloat16: 7168 values, 8 weights
        ((4096, 24), 4128),  # DeepSeek-V2-Lite: 8 bytes more
        ((8192, 8), 8208),  # Mixtral: 8 bytes more
        ((472, 6), 480),
        ((432, 2), 434),  # 14 bytes more would be 3.2 %
        ((128, 12), 144),
        ((16, 8), 24),  # 8 bytes more would be a third
        ((4100,), 4100),  # one part: a dense tensor
    ],
)
def test_rows_start_at_whole_vectors_where_that_is_at_most_3_percent_more(parts: tuple[int, ...], pitch: int) -> None:
    assert row_bytes(*parts) == pitch
