"""The kernels. Needs triton; nothing but ``launch`` imports this.

Widths and pitches come in vectors of ``VECTOR`` values, as many as all of them are a multiple of: the compiler then
knows that each row starts at a multiple of so many bytes, and reads and writes 16 of them per thread.
"""

import triton
import triton.language as tl


@triton.jit
def pack(
    row_of,
    out,
    pitch,
    wide,
    wide_width,
    wide_pitch,
    a,
    a_pitch,
    b,
    b_pitch,
    c,
    c_pitch,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
):
    """out[i] = wide[row_of[i]], a[row_of[i]], b[row_of[i]], c[row_of[i]], side by side. The last three are A, B and C
    values wide."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(row_of + i)
    width = wide_width * VECTOR
    start = out + i * (pitch * VECTOR)
    _copy(wide + row * (wide_pitch * VECTOR), start, width, BLOCK)
    if A:
        _copy(a + row * a_pitch, start + width, A, BLOCK)
    if B:
        _copy(b + row * b_pitch, start + width + A, B, BLOCK)
    if C:
        _copy(c + row * c_pitch, start + width + A + B, C, BLOCK)


@triton.jit
def expand(
    rows,
    pitch,
    row_of,
    out,
    width,
    column_of,
    value_out,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """out[i] = rows[row_of[i], :width], and value_out[i] = number column_of[i] of those behind, UNITS values wide."""
    i = tl.program_id(0).to(tl.int64)
    start = rows + tl.load(row_of + i) * (pitch * VECTOR)
    width = width * VECTOR
    _copy(start, out + i * width, width, BLOCK)
    value = start + width + tl.load(column_of + i) * UNITS
    for unit in range(UNITS):
        tl.store(value_out + i * UNITS + unit, tl.load(value + unit))


@triton.jit
def sums(
    rows,
    pitch,
    weight,
    row_of_entry,
    first_entry,
    num_entries,
    num_sums,
    out,
    width,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """out[i] = the sum of weight[e] * rows[row_of_entry[e]] over its entries e, in their order; rounded once."""
    i = tl.program_id(0).to(tl.int64)
    width = width * VECTOR
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first = tl.load(first_entry + i)
    last = tl.load(first_entry + i + 1, mask=i + 1 < num_sums, other=num_entries)
    total = tl.zeros([BLOCK], dtype=tl.float64 if rows.dtype.element_ty == tl.float64 else tl.float32)
    for entry in range(first, last):
        start = rows + tl.load(row_of_entry + entry) * (pitch * VECTOR)
        term = tl.load(start + column, mask=inside, other=0.0).to(total.dtype)
        if WEIGHTED:
            term = term * tl.load(weight + entry).to(total.dtype)
        total += term
    tl.store(out + i * width + column, _rounded(total, out), mask=inside)


@triton.jit
def dots(
    a,
    b,
    b_pitch,
    row_of_b,
    out,
    width,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i] = the product of a[i] and b[row_of_b[i]], summed in the dtype of ``out``."""
    i = tl.program_id(0).to(tl.int64)
    width = width * VECTOR
    a_row, b_row = a + i * width, b + tl.load(row_of_b + i) * (b_pitch * VECTOR)
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        of_a = tl.load(a_row + column, mask=column < width, other=0.0).to(total.dtype)
        total += of_a * tl.load(b_row + column, mask=column < width, other=0.0).to(total.dtype)
    tl.store(out + i, tl.sum(total, 0))


@triton.jit
def entries(
    flat_of,
    mine_of,
    token_of,
    received_of,
    count,
    K,
    num_tokens,
    key_out,
    token_out,
    received_out,
    choice_out,
    BLOCK: tl.constexpr,
):
    """source, choice_out[i] = divmod(flat_of[i], K); of the source the token and the received row; and
    key_out[i] = mine_of[flat_of[i]] * num_tokens + token_out[i]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    flat = tl.load(flat_of + i, mask=inside, other=0)
    source = flat // K
    token = tl.load(token_of + source, mask=inside, other=0)
    tl.store(token_out + i, token, mask=inside)
    tl.store(received_out + i, tl.load(received_of + source, mask=inside, other=0), mask=inside)
    tl.store(choice_out + i, flat - source * K, mask=inside)
    tl.store(key_out + i, tl.load(mine_of + flat, mask=inside, other=0) * num_tokens + token, mask=inside)


@triton.jit
def reorder(entry_of, a, b, c, count, a_out, b_out, c_out, row_of_out, BLOCK: tl.constexpr):
    """a_out[i] = a[entry_of[i]], b and c alike, and row_of_out[entry_of[i]] = i."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    entry = tl.load(entry_of + i, mask=inside, other=0)
    tl.store(a_out + i, tl.load(a + entry, mask=inside, other=0), mask=inside)
    tl.store(b_out + i, tl.load(b + entry, mask=inside, other=0), mask=inside)
    tl.store(c_out + i, tl.load(c + entry, mask=inside, other=0), mask=inside)
    tl.store(row_of_out + entry, i, mask=inside)


@triton.jit
def _copy(source, out, width, BLOCK: tl.constexpr):
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        tl.store(out + column, tl.load(source + column, mask=column < width), mask=column < width)


@triton.jit
def _rounded(x, out):
    """In the dtype of ``out``, ties to even. By hand for bfloat16: Triton's interpreter cuts the bits off."""
    if out.dtype.element_ty != tl.bfloat16:
        return x.to(out.dtype.element_ty)
    bits = x.to(tl.uint32, bitcast=True)
    up = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)  # a NaN stays one
    return (up >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
