"""Ints that travel in the dtype of the payload: each of their bytes is sent as a number from 0 to 255.

Every floating dtype holds these numbers exactly, so they survive whatever a copy does to floats: a compiled copy of
16-bit floats goes through float32, which makes a signalling NaN a quiet one; hardware may flush denormals.
"""

import torch
from torch import Tensor

BYTES = 8  # of an int64


def as_floats(x_K: Tensor, dtype: torch.dtype) -> Tensor:
    """(K,) int64 -> flat, of ``dtype``, 8 numbers for each."""
    byte_K8 = x_K[:, None] >> _shifts(x_K) & 0xFF
    return byte_K8.to(dtype).flatten()


def as_ints(x_PF: Tensor) -> Tensor:
    """(P, numbers) -> (P, K) int64: what :func:`as_floats` got, of each of P ranks."""
    byte_PK8 = x_PF.to(torch.int64).unflatten(1, (-1, BYTES))
    return (byte_PK8 << _shifts(x_PF)).sum(-1)


def _shifts(like: Tensor) -> Tensor:
    """(8,): by how much each byte is shifted. Made on the device: a copy from the host would wait for it."""
    return torch.arange(0, 8 * BYTES, 8, device=like.device)
