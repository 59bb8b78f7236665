"""Rules about dtypes that several rooms share."""

import torch
from torch import Tensor


def is_integer(x: Tensor) -> bool:
    """Whether ``x`` holds ints; bools are none."""
    return not (x.dtype == torch.bool or x.is_floating_point() or x.is_complex())


def dtype_of_sums(x: Tensor) -> torch.dtype:
    """In which sums over ``x`` are taken: float32 for float16 and bfloat16, else its own."""
    return torch.promote_types(x.dtype, torch.float32)
