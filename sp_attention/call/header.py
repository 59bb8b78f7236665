"""Ints that travel in the dtype of the payload: the same bits, whatever a copy does to floats.

A compiled copy of 16-bit floats goes through float32, which makes a signalling NaN a quiet one; hardware may flush
denormals. So an int is sent as 16-bit units in which bit 14 is clear and bit 13 is set. Each is an ordinary number in
float16 and bfloat16, and so is each float32 or float64 whose upper half or quarter it is. The other 14 bits of a unit
hold what is sent.
"""

import torch
from torch import Tensor

UNITS = 4  # of 16 bits each: as long as an int64
UNIT_BITS = 14
INT_BITS = UNITS * UNIT_BITS
LOW = 0x1FFF  # bits 0 to 12; the last bit of the payload is the sign
BIT_13 = 0x2000


def as_floats(x_K: Tensor, dtype: torch.dtype) -> Tensor:
    """(K,) int64, from -2**55 to 2**55 - 1 -> flat, of ``dtype``, 8 bytes for each."""
    payload_K4 = x_K[:, None] >> _shifts(x_K)
    unit_K4 = (payload_K4 & LOW) + BIT_13 - (payload_K4 >> 13 & 1) * 0x8000
    return unit_K4.to(torch.int16).flatten().view(dtype)


def as_ints(x_PF: Tensor) -> Tensor:
    """(P, floats) -> (P, K) int64: what :func:`as_floats` got, of each of P ranks."""
    unit_PK4 = x_PF.view(torch.int16).unflatten(1, (-1, UNITS)).to(torch.int64)
    payload_PK4 = (unit_PK4 & LOW) | (unit_PK4 >> 15 & 1) << 13
    bits_PK = (payload_PK4 << _shifts(x_PF)).sum(-1)
    unused = 64 - INT_BITS
    return bits_PK << unused >> unused  # spreads the sign


def _shifts(like: Tensor) -> Tensor:
    """(4,): by how much each unit is shifted. Made on the device: a copy from the host would wait for it."""
    return torch.arange(0, INT_BITS, UNIT_BITS, device=like.device)
