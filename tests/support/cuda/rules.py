"""What operations mean on CUDA: which wait for the host, which write no memory, and what they leave unwritten."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

VIEWS = frozenset(
    {
        "view", "split", "split_with_sizes", "slice", "select", "expand", "unsqueeze", "t", "transpose", "permute",
        "alias", "detach", "as_strided", "unbind", "_reshape_alias", "lift_fresh", "lift", "_unsafe_view", "squeeze",
        "narrow", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "view_as_real",
        "view_as_complex",
    }
)  # fmt: skip
EMPTY = frozenset({"empty", "empty_strided", "new_empty", "empty_like", "new_empty_strided"})
WAITING = frozenset(
    {
        "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique", "_unique2", "unique_dim",
        "unique_consecutive", "bincount",
    }
)  # fmt: skip
INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
POISON = 0xFF  # of every byte: NaN in each floating dtype, -1 in ints
SUMMED_BY_ATOMICS = frozenset({"index_add", "index_add_", "scatter_add", "scatter_add_"})
ORDERED = SUMMED_BY_ATOMICS | {"scatter", "scatter_", "index_copy", "index_copy_", "sort"} | (INDEXED - {"index"})
CHECKED = ORDERED | WAITING | INDEXED | {"_embedding_bag", "_grouped_mm", "nonzero_static", "repeat_interleave"}


@cache
def short(func: Any) -> str:
    """The name without namespace and overload."""
    return func.name().split("::")[1].split(".")[0]


def is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def waits(name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the size or the value of its result is read by the host."""
    if func.name() == "aten::repeat_interleave.Tensor":
        return kwargs.get("output_size") is None
    if name == "_grouped_mm" and args[0].dtype != torch.bfloat16:  # torch reads the offsets and multiplies one by one
        return True
    return name in WAITING or (name in INDEXED and any(map(is_mask, args[1])))


def refused(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """What CUDA refuses, or gets wrong, of host tensors in place of those of the device; empty where nothing is."""
    if name == "_embedding_bag":
        rows, weights = args[0], args[6] if len(args) > 6 else kwargs.get("per_sample_weights")
        if weights is not None and weights.dtype != rows.dtype:
            return f"embedding_bag of {rows.dtype} with weights of {weights.dtype}"
        if rows.itemsize < 2:
            return f"embedding_bag of {rows.dtype}"
    if name == "_grouped_mm":
        for x in args[:2]:
            if x.storage_offset() * x.itemsize % 16:
                return "grouped_mm of memory that does not start at 16 bytes"
    if name == "nonzero_static" and not args[0].numel() and kwargs.get("size"):
        return "nonzero_static of nothing: its kernel divides by zero"
    return ""


def is_unordered(name: str, func: Any, args: Sequence[Any]) -> bool:
    """Whether its result depends on the order of writes, or of equal keys; of host tensors, as :func:`refused`."""
    if name in ("index_put", "index_put_", "_index_put_impl_") and not (len(args) > 3 and args[3]):
        indices = [index for index in args[1] if index is not None]
        if not indices or any(map(is_mask, indices)):
            return False
        return _repeats(torch.stack(torch.broadcast_tensors(*indices)).flatten(1).T)
    if func.name() in ("aten::scatter_.src", "aten::scatter.src") or name in ("index_copy", "index_copy_"):
        return _repeats_along(args[2], args[1])
    if name in SUMMED_BY_ATOMICS and args[0].is_floating_point():
        return _repeats_along(args[2], args[1] if args[2].ndim > 1 else 0)
    return func.name() == "aten::sort" and _repeats_along(args[0], -1)  # "sort.stable" keeps the order of equal keys


def _repeats(values: Tensor) -> bool:
    return len(torch.unique(values, dim=0)) < len(values)


def _repeats_along(values: Tensor, dim: int) -> bool:
    return bool((values.sort(dim).values.diff(dim=dim) == 0).any()) if values.numel() else False


def poison(name: str, out: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Write what a program must not read where the device leaves memory as it was."""
    if name in EMPTY and out.numel():
        if out.is_contiguous():
            out.view(-1).view(torch.uint8).fill_(POISON)
        elif out.is_floating_point():
            out.fill_(torch.nan)
    if name == "_grouped_mm":
        ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
        if ends is None:
            return
        if args[0].ndim == 2 and args[1].ndim == 3:
            out[int(ends[-1]) :] = torch.nan  # rows of no expert
        if args[0].ndim == args[1].ndim == 2:
            out[ends.diff(prepend=ends.new_zeros(1)) == 0] = torch.nan  # matrices of experts without rows
