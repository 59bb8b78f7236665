"""The options of one call: what was given, whether ``attend`` can honour it, and this rank's heads of it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attend.documents import Documents
from ..attend.dropout import Dropout
from .checks import is_number
from .inputs import AttentionInputs, constants


def given_options(
    *,
    is_causal: bool,
    window: tuple[int, int] | None,
    scale: float | None,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    sinks_N: Tensor | None,
    dropout_p: float,
) -> dict[str, Any]:
    """Those that ask for something, by the names that ``attend`` knows them by, as the caller gave them."""
    options = {
        "is_causal": None if is_causal is False else is_causal,
        "window": window,
        "scale": scale,
        "attn_mask": attn_mask,
        "key_padding_mask": key_padding_mask,
        "sinks_n": sinks_N,
        "dropout": None if is_number(dropout_p) and dropout_p == 0 else dropout_p,
    }
    return {name: value for name, value in options.items() if value is not None}


def problem_of_attend(attend: Callable[..., Tensor], options: Mapping[str, Any]) -> str:
    """Why ``attend`` cannot honour every option; empty where it can. An option is honoured or refused, never
    ignored."""
    if attend is F.scaled_dot_product_attention:
        return (
            "attend is torch's scaled_dot_product_attention, which takes (B, n, L, H) and would read lengths as "
            "heads; leave attend out to use it in the right layout"
        )
    try:
        parameters = inspect.signature(attend).parameters
    except (TypeError, ValueError):
        return f"attend is {attend!r}, whose arguments cannot be seen; pass a function attend(q, k, v, **options)"
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return ""
    ignored = [name for name in options if name not in parameters]
    if ignored:
        return (
            f"attend {getattr(attend, '__name__', attend)!r} takes no {', '.join(ignored)}; give it arguments of "
            "these names, or leave the options out"
        )
    return ""


def of_my_heads(options: Mapping[str, Any], seed: Tensor, inputs: AttentionInputs) -> dict[str, Any]:
    """The options with this rank's heads of whatever has a head dimension; masks with all four; dropout with its
    seed."""
    mine = dict(options)
    first, size = inputs.heads.query.offsets[inputs.rank], inputs.heads.query.sizes[inputs.rank]
    if "attn_mask" in mine:
        mask = mine["attn_mask"]
        mask = mask[(None,) * (4 - mask.ndim)]
        mine["attn_mask"] = mask.narrow(1, first, size) if mask.shape[1] > 1 else mask
    if "sinks_n" in mine:
        mine["sinks_n"] = mine["sinks_n"].narrow(0, first, size)
    if "dropout" in mine:
        mine["dropout"] = Dropout(p=mine["dropout"], first_head=first, seed=seed)
    return mine


def facts_of(inputs: AttentionInputs, options: Mapping[str, Any], documents: Documents | None) -> str:
    """What the ranks have to agree about."""
    learned = [value for value in options.values() if isinstance(value, Tensor)]
    # A rank that takes no part in backward, of the exchange there or of the one back, would leave its peers waiting.
    of_tensors, of_options = (
        torch.is_grad_enabled() and any(x.requires_grad for x in tensors) for tensors in (inputs.tensors, learned)
    )
    words = [inputs.facts, described(options), f"{documents or 'one document'}"]
    return "; ".join([*words, f"gradients of q, k or v {of_tensors}, of options {of_options}"])


def described(options: Mapping[str, Any]) -> str:
    """The options as text: values where they are short, shapes and dtypes where they are tensors. All of them are
    numbers here, also while torch.compile traces: see :func:`constants`."""
    words = []
    for name, value in options.items():
        if isinstance(value, Tensor):
            words.append(f"{name} {constants(value.shape)} of {value.dtype}")
        elif isinstance(value, bool):
            words.append(f"{name} {value}")
        else:
            words.append(f"{name} {float(value) if is_number(value) else constants(value)}")
    return ", ".join(words)
