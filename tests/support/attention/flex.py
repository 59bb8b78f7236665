"""Tensors and a score_mod for the tests of flex_attend."""

import torch
from torch import Tensor


def tensors(
    queries: int, keys: int, dtype: torch.dtype = torch.float64, heads: tuple[int, int] = (4, 2), v_width: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(queries)
    shapes = [(2, queries, heads[0], 8), (2, keys, heads[1], 8), (2, keys, heads[1], v_width)]
    q, k, v = (torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


PADDING_BL = torch.arange(7) >= torch.tensor([[2], [0]])


def slope(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score + head * (key - query) * 0.1
