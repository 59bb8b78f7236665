"""Ints in the dtype of the payload: every one of them arrives, also after copies that change NaN and denormals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dispatch.internals import BAD, digest
from sp_attention.attend.dropout import NUM_SEEDS
from sp_attention.call.header import INT_BITS, UNIT_BITS, UNITS, as_floats, as_ints

LOWEST, HIGHEST = -(2 ** (INT_BITS - 1)), 2 ** (INT_BITS - 1) - 1
# What a copy may go through: exact for ordinary numbers, not for signalling NaN.
THROUGH = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
    torch.float64: (),
}


def all_units() -> Tensor:
    """Ints that have each value of a unit at each of its four places."""
    payload = torch.arange(2**UNIT_BITS)
    shifts = torch.arange(0, INT_BITS, UNIT_BITS)
    ints = (payload[:, None] << shifts).flatten()
    return ints << 64 - INT_BITS >> 64 - INT_BITS


def received(floats: Tensor) -> Tensor:
    """The ints of a header that one rank sent."""
    return as_ints(floats[None])[0]


@pytest.mark.parametrize("dtype", THROUGH)
def test_every_unit_is_an_ordinary_number(dtype: torch.dtype) -> None:
    """No NaN, infinity, zero or denormal, and the same through any copy."""
    wanted = all_units()
    assert len(wanted.unique()) == UNITS * (2**UNIT_BITS - 1) + 1
    floats = as_floats(wanted, dtype)
    assert floats.dtype == dtype
    assert floats.nbytes == 8 * len(wanted)
    assert bool(floats.isfinite().all())
    assert bool((floats.abs() >= torch.finfo(dtype).smallest_normal).all())
    for wider in THROUGH[dtype]:
        assert torch.equal(floats.to(wider).to(dtype).view(torch.int16), floats.view(torch.int16))
    assert torch.equal(received(floats * 1.0), wanted)


def test_all_values_of_16_bits_are_units_or_not() -> None:
    """A unit has bit 14 clear and bit 13 set: a quarter of all 2 ** 16 values, each of which is one."""
    units = as_floats(all_units(), torch.float16).view(torch.int16).to(torch.int64) & 0xFFFF
    value = torch.arange(2**16)
    assert torch.equal(units.unique(), value[value & 0x6000 == 0x2000])


@pytest.mark.parametrize("dtype", THROUGH)
@settings(deadline=None)
@given(ints=st.lists(st.integers(LOWEST, HIGHEST), min_size=1, max_size=3))
def test_ints_of_56_bits_arrive(dtype: torch.dtype, ints: list[int]) -> None:
    wanted = torch.tensor(ints)
    floats = as_floats(wanted, dtype)
    for wider in THROUGH[dtype]:
        floats = floats.to(wider).to(dtype)
    assert received(floats).tolist() == ints
    assert as_ints(torch.stack([floats, floats])).tolist() == [ints, ints]


@pytest.mark.parametrize("dtype", THROUGH)
def test_words_and_seeds_fit(dtype: torch.dtype) -> None:
    ints = [BAD, digest("facts"), 0, 2**31 - 2, NUM_SEEDS - 1, LOWEST, HIGHEST]
    assert received(as_floats(torch.tensor(ints), dtype)).tolist() == ints
