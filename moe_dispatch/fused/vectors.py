"""What a thread of a GPU reads and writes at once."""

from math import gcd

from torch import Tensor

VECTOR_BYTES = 16  # where rows start at a multiple of it


def values_at_once(rows: Tensor, *widths: int) -> int:
    """The most values of ``rows``, of 16 bytes together, of which all widths are a multiple."""
    return gcd(VECTOR_BYTES // rows.itemsize, *widths)
