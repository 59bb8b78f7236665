"""The options of attention, one record each: all that the call knows of an option is here.

To add one: its record, the signatures of ``ulysses_attention`` and ``UlyssesAttention``, the ``attend`` that honours
it, and ``reference_attention``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from moe_dispatch.internals import problem_of_dtensors

from ..blocks.dropout import Dropout
from ..work.runs import Run
from .call_inputs import Inputs, constants


def given(value: Any) -> bool:
    """Whether the caller asks for something with it."""
    return value is not None


def unchanged(value: Any, *_context: object) -> Any:
    """An option that is the same for all heads, or in every document."""
    return value


def shape_and_dtype(value: Tensor) -> str:
    return f"{constants(value.shape)} of {value.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option of attention.

    Attributes:
        name: the argument of ``ulysses_attention``.
        name_in_attend: the argument of ``attend``.
        is_given: whether a value asks for something. It may be any value that a caller passes.
        problem: what is wrong with a value, one sentence; empty where nothing is. It travels with the queries, so it
            takes any value and never raises.
        fact: the value as text, for what all ranks have to agree on: a number, or shape and dtype. In it all sizes
            are numbers, also while torch.compile traces; see ``constants``.
        of_heads: of the value, what this rank's heads need. The seed is the same on every rank; only an option that
            is ``drawn`` uses it.
        of_part: of what ``of_heads`` gave, what some queries and some keys need: (first place, end) of each.
        is_drawn: whether it needs a seed.
    """

    name: str
    name_in_attend: str
    is_given: Callable[[Any], bool] = given
    problem: Callable[[Any, Inputs], str]
    fact: Callable[[Any], str]
    of_heads: Callable[[Any, Inputs, Tensor], Any] = unchanged
    of_part: Callable[[Any, Run, Run], Any] = unchanged
    is_drawn: bool = False


def is_number(value: object) -> bool:
    """Neither a tensor, whose gradient would be lost and whose value every rank would have to read, nor NaN."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return -math.inf < float(value) < math.inf
    except OverflowError:  # an int beyond them
        return False


def problem_of_tensor(name: str, value: Any, inputs: Inputs) -> str:
    """What is wrong with what should be a tensor beside q, k, v; empty where nothing is."""
    if not isinstance(value, Tensor):
        return f"{name} is {type(value).__name__}; it has to be a tensor"
    if problem := problem_of_dtensors(**{name: value}):
        return problem
    if value.device != inputs.device:
        return f"{name} is on {value.device}, but {inputs.names} on {inputs.device}; move it there"
    return ""


# ---- is_causal -----------------------------------------------------------------------------------------


def _causal_problem(value: Any, inputs: Inputs) -> str:
    return "" if isinstance(value, bool) else f"is_causal is {value!r}; it has to be True or False"


IS_CAUSAL = Option(
    name="is_causal",
    name_in_attend="is_causal",
    is_given=lambda value: value is not None and value is not False,
    problem=_causal_problem,
    fact=str,
)


# ---- window --------------------------------------------------------------------------------------------


def _window_problem(value: Any, inputs: Inputs) -> str:
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    if is_pair and all(isinstance(side, int) and side >= -1 for side in value):
        return ""
    return f"window is {value!r}; it is (left, right), each an int of at least -1 (-1: unlimited)"


WINDOW = Option(
    name="window", name_in_attend="window", problem=_window_problem, fact=lambda value: f"{constants(value)}"
)


# ---- scale ---------------------------------------------------------------------------------------------


def _scale_problem(value: Any, inputs: Inputs) -> str:
    return "" if is_number(value) else f"scale is {value!r}; it has to be a finite number"


SCALE = Option(name="scale", name_in_attend="scale", problem=_scale_problem, fact=lambda value: f"{float(value)}")


# ---- attn_mask -----------------------------------------------------------------------------------------


def _mask_problem(value: Any, inputs: Inputs) -> str:
    (queries, keys), batch, heads = inputs.lengths, inputs.sharding.batch.total, inputs.heads.query.total
    if problem := problem_of_tensor("attn_mask", value, inputs):
        return problem
    broadcasts = value.ndim <= 4 and all(
        size in (1, whole) for size, whole in zip(value.shape[::-1], (keys, queries, heads, batch), strict=False)
    )
    if broadcasts and (value.dtype == torch.bool or value.is_floating_point()):
        return ""
    return (
        f"attn_mask is {tuple(value.shape)} of {value.dtype}; it has to broadcast to (B, N, L, L_kv) = "
        f"{(batch, heads, queries, keys)}, e.g. {(queries, keys)}, {(batch, 1, queries, keys)} or "
        f"{(batch, 1, 1, keys)}, and be bool (True attends) or floating"
    )


def _mask_of_heads(mask: Tensor, inputs: Inputs, _seed: Tensor) -> Tensor:
    """With all four dimensions."""
    mask = mask[(None,) * (4 - mask.ndim)]
    return mask.narrow(1, inputs.first_head, inputs.num_heads) if mask.shape[1] > 1 else mask


def _mask_of_part(mask: Tensor, queries: Run, keys: Run) -> Tensor:
    for dim, (start, end) in ((2, queries), (3, keys)):
        if mask.shape[dim] > 1:
            mask = mask.narrow(dim, start, end - start)
    return mask


ATTN_MASK = Option(
    name="attn_mask",
    name_in_attend="attn_mask",
    problem=_mask_problem,
    fact=shape_and_dtype,
    of_heads=_mask_of_heads,
    of_part=_mask_of_part,
)


# ---- key_padding_mask ----------------------------------------------------------------------------------


def _padding_problem(value: Any, inputs: Inputs) -> str:
    batch, keys = inputs.sharding.batch.total, inputs.lengths[1]
    if problem := problem_of_tensor("key_padding_mask", value, inputs):
        return problem
    if tuple(value.shape) == (batch, keys) and value.dtype == torch.bool:
        return ""
    return (
        f"key_padding_mask is {tuple(value.shape)} of {value.dtype}; it has to be (B, L_kv) = "
        f"{(batch, keys)}, the whole sequence on every rank, and bool (True attends)"
    )


KEY_PADDING_MASK = Option(
    name="key_padding_mask",
    name_in_attend="key_padding_mask",
    problem=_padding_problem,
    fact=shape_and_dtype,
    of_part=lambda mask, queries, keys: mask[:, keys[0] : keys[1]],
)


# ---- sinks ---------------------------------------------------------------------------------------------


def _sinks_problem(value: Any, inputs: Inputs) -> str:
    heads = inputs.heads.query.total
    if problem := problem_of_tensor("sinks_N", value, inputs):
        return problem
    if tuple(value.shape) == (heads,):
        return ""
    return f"sinks_N is {tuple(value.shape)}; it has to be ({heads},), one logit per query head"


SINKS = Option(
    name="sinks_N",
    name_in_attend="sinks_n",
    problem=_sinks_problem,
    fact=shape_and_dtype,
    of_heads=lambda sinks_N, inputs, _seed: sinks_N.narrow(0, inputs.first_head, inputs.num_heads),
)


# ---- dropout -------------------------------------------------------------------------------------------


def _dropout_problem(value: Any, inputs: Inputs) -> str:
    if is_number(value) and 0 <= value < 1:
        return ""
    return f"dropout_p is {value!r}; it has to be a number of at least 0 and below 1"


DROPOUT = Option(
    name="dropout_p",
    name_in_attend="dropout",
    is_given=lambda value: value is not None and not (is_number(value) and value == 0),
    problem=_dropout_problem,
    fact=lambda value: f"{float(value)}",
    of_heads=lambda p, inputs, seed: Dropout(p=p, first_head=inputs.first_head, seed=seed),
    of_part=lambda dropout, queries, keys: replace(dropout, first_query=queries[0], first_key=keys[0]),
    is_drawn=True,
)


OPTIONS = (IS_CAUSAL, WINDOW, SCALE, ATTN_MASK, KEY_PADDING_MASK, SINKS, DROPOUT)
