"""Ints in the dtype of the payload: every one of them arrives, also after copies that change NaN and denormals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dispatch.internals import BAD, digest
from sp_attention.blocks.dropout import NUM_SEEDS
from sp_attention.wire.ints_as_floats import BYTES, as_floats, as_ints

LOWEST, HIGHEST = -(2**63), 2**63 - 1
# What a copy may go through.
THROUGH = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64, torch.bfloat16),
    torch.float64: (torch.float16,),
}


def received(floats: Tensor) -> Tensor:
    """The ints of a header that one rank sent."""
    return as_ints(floats[None])[0]


@pytest.mark.parametrize("dtype", THROUGH)
def test_each_byte_is_its_number(dtype: torch.dtype) -> None:
    """Each value at each of the eight places."""
    wanted = (torch.arange(256)[:, None] << torch.arange(0, 64, 8)).flatten()
    floats = as_floats(wanted, dtype)
    assert (floats.dtype, floats.shape) == (dtype, (BYTES * len(wanted),))
    at_place = floats.view(256, 8, 8).diagonal(dim1=1, dim2=2)  # of the int with a byte at that place only
    assert torch.equal(at_place, torch.arange(256, dtype=dtype)[:, None].expand(256, 8))
    assert torch.equal(received(floats), wanted)


@pytest.mark.parametrize("dtype", THROUGH)
@settings(deadline=None)
@given(ints=st.lists(st.integers(LOWEST, HIGHEST), min_size=1, max_size=3))
def test_ints_arrive(dtype: torch.dtype, ints: list[int]) -> None:
    floats = as_floats(torch.tensor(ints), dtype)
    for other in THROUGH[dtype]:
        floats = floats.to(other).to(dtype)
    assert received(floats).tolist() == ints
    assert as_ints(torch.stack([floats, floats])).tolist() == [ints, ints]


@pytest.mark.parametrize("dtype", THROUGH)
def test_words_and_seeds_fit(dtype: torch.dtype) -> None:
    ints = [BAD, digest("facts"), 0, 2**31 - 2, NUM_SEEDS - 1, LOWEST, HIGHEST]
    assert received(as_floats(torch.tensor(ints), dtype)).tolist() == ints


@pytest.mark.parametrize("dtype", THROUGH)
def test_what_follows_a_header_is_aligned_for_vector_loads(dtype: torch.dtype) -> None:
    """Kernels read 16 bytes at once, where both sides start at a multiple of them."""
    assert as_floats(torch.tensor([0]), dtype).nbytes % 16 == 0
