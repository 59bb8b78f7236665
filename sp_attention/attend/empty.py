"""Nothing to attend: a rank without heads, a document without tokens, padding. Its output is zeros."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def attend_or_zeros(
    attend: Callable[..., Tensor], q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor, options: Mapping[str, Any]
) -> Tensor:
    """``attend``, unless there is no query, head or key.

    Then zeros that are in the graph of the tensors and of whatever is learned among the options, so that this rank
    takes part in every exchange of backward.
    """
    if q_BLnH.numel() and k_BLgH.numel() and v_BLgH.shape[3]:
        return attend(q_BLnH, k_BLgH, v_BLgH, **options)
    learned = [x for x in options.values() if isinstance(x, Tensor) and x.is_floating_point()]
    zero = zero_in_graph([q_BLnH, k_BLgH, v_BLgH, *learned], q_BLnH.dtype)
    return zeros(q_BLnH.shape[1], q_BLnH, v_BLgH) + zero


def zero_in_graph(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """() 0, in the graph of each of them."""
    zero = torch.zeros((), dtype=dtype, device=tensors[0].device)
    return sum((x.flatten()[:0].sum().to(dtype) for x in tensors), zero)


def zeros(length: int, q_BLnH: Tensor, v_BLgH: Tensor) -> Tensor:
    """(B, length, n, Hv): the output of ``length`` queries that attend to nothing."""
    return q_BLnH.new_zeros(q_BLnH.shape[0], length, q_BLnH.shape[2], v_BLgH.shape[3])
