"""What is wrong with the value of an option: one sentence, or nothing. It travels with the queries, so a check takes
whatever the caller may have passed, and never raises."""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .inputs import AttentionInputs


def problem_of(options: Mapping[str, Any], inputs: AttentionInputs) -> str:
    """What is wrong with the first of the options that has something wrong; empty where nothing is."""
    for name, value in options.items():
        if problem := CHECKS[name](value, inputs):
            return problem
    return ""


def is_number(value: object) -> bool:
    """Neither a tensor, whose gradient would be lost and whose value every rank would have to read, nor NaN."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return -math.inf < float(value) < math.inf
    except OverflowError:  # an int beyond them
        return False


def _of_causal(value: Any, inputs: AttentionInputs) -> str:
    return "" if isinstance(value, bool) else f"is_causal is {value!r}; it has to be True or False"


def _of_window(value: Any, inputs: AttentionInputs) -> str:
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    if is_pair and all(isinstance(side, int) and side >= -1 for side in value):
        return ""
    return f"window is {value!r}; it is (left, right), each an int of at least -1 (-1: unlimited)"


def _of_scale(value: Any, inputs: AttentionInputs) -> str:
    return "" if is_number(value) else f"scale is {value!r}; it has to be a finite number"


def _of_dropout(value: Any, inputs: AttentionInputs) -> str:
    if is_number(value) and 0 <= value < 1:
        return ""
    return f"dropout_p is {value!r}; it has to be a number of at least 0 and below 1"


def _of_mask(value: Any, inputs: AttentionInputs) -> str:
    (queries, keys), batch, heads = inputs.lengths, inputs.sharding.batch.total, inputs.heads.query.total
    if problem := _of_tensor("attn_mask", value, inputs):
        return problem
    if _broadcasts(value, (batch, heads, queries, keys)) and (value.dtype == torch.bool or value.is_floating_point()):
        return ""
    return (
        f"attn_mask is {tuple(value.shape)} of {value.dtype}; it has to broadcast to (B, N, L, L_kv) = "
        f"{(batch, heads, queries, keys)}, e.g. {(queries, keys)}, {(batch, 1, queries, keys)} or "
        f"{(batch, 1, 1, keys)}, and be bool (True attends) or floating"
    )


def _of_padding(value: Any, inputs: AttentionInputs) -> str:
    batch, keys = inputs.sharding.batch.total, inputs.lengths[1]
    if problem := _of_tensor("key_padding_mask", value, inputs):
        return problem
    if tuple(value.shape) == (batch, keys) and value.dtype == torch.bool:
        return ""
    return (
        f"key_padding_mask is {tuple(value.shape)} of {value.dtype}; it has to be (B, L_kv) = "
        f"{(batch, keys)}, the whole sequence on every rank, and bool (True attends)"
    )


def _of_sinks(value: Any, inputs: AttentionInputs) -> str:
    heads = inputs.heads.query.total
    if problem := _of_tensor("sinks_N", value, inputs):
        return problem
    if tuple(value.shape) == (heads,):
        return ""
    return f"sinks_N is {tuple(value.shape)}; it has to be ({heads},), one logit per query head"


def _of_tensor(name: str, value: Any, inputs: AttentionInputs) -> str:
    if not isinstance(value, Tensor):
        return f"{name} is {type(value).__name__}; it has to be a tensor"
    if value.device != inputs.device:
        return f"{name} is on {value.device}, but q, k, v on {inputs.device}; move it there"
    return ""


def _broadcasts(mask: Tensor, shape: tuple[int, ...]) -> bool:
    return mask.ndim <= 4 and all(
        size in (1, whole) for size, whole in zip(mask.shape[::-1], shape[::-1], strict=False)
    )


CHECKS: Mapping[str, Callable[[Any, AttentionInputs], str]] = MappingProxyType(
    {
        "is_causal": _of_causal,
        "window": _of_window,
        "scale": _of_scale,
        "dropout": _of_dropout,
        "attn_mask": _of_mask,
        "key_padding_mask": _of_padding,
        "sinks_n": _of_sinks,
    }
)
