"""One dtype all the way through torchtitan's MoE block."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torchtitan.models.common import moe, token_dispatcher
from torchtitan.models.common.moe import GroupedExperts


class _Float64:
    """torch, in which float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _product_by_expert(self: Any, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
    products = [A[start:end] @ w for (start, end), w in zip(pairwise([0, *offs.tolist()]), B_t, strict=True)]
    return torch.cat(products)


@contextmanager
def without_casts(dtype: torch.dtype) -> Iterator[None]:
    """torchtitan computes experts in bfloat16 and weighs in float32. In here it is ``dtype`` all the way, on any
    thread. torch has no grouped product of float64, so experts go one by one."""
    if dtype == torch.bfloat16:
        yield
        return
    cast, product = Tensor.bfloat16, GroupedExperts._grouped_mm
    Tensor.bfloat16 = lambda x, *args, **kwargs: x  # type: ignore[method-assign]
    GroupedExperts._grouped_mm = _product_by_expert  # type: ignore[method-assign]
    if dtype == torch.float64:
        token_dispatcher.torch = moe.torch = _Float64()  # type: ignore[assignment]
    try:
        yield
    finally:
        token_dispatcher.torch = moe.torch = torch  # type: ignore[assignment]
        Tensor.bfloat16, GroupedExperts._grouped_mm = cast, product  # type: ignore[method-assign]
