"""The options of one call: what was given, whether ``attend`` can honour it, and this rank's heads of it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call


def check_honoured(attend: Callable[..., Tensor], options: Mapping[str, Any]) -> None:
    """ValueError unless ``attend`` has an argument for every option: an option is honoured or refused, never
    ignored."""
    if attend is F.scaled_dot_product_attention:
        raise ValueError(
            "attend is torch's scaled_dot_product_attention, which takes (B, n, L, H) and would read lengths as "
            "heads; leave attend out to use it in the right layout"
        )
    parameters = inspect.signature(attend).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    ignored = [name for name in options if name not in parameters]
    if ignored:
        raise ValueError(
            f"attend {getattr(attend, '__name__', attend)!r} takes no {', '.join(ignored)}; give it arguments of "
            "these names, or leave the options out"
        )


def problem_of(options: Mapping[str, Any], call: Call) -> str:
    """What is wrong with the values of the options; empty where nothing is."""
    batch, (queries, keys), heads = call.sharding.batch.total, call.lengths, call.heads.query.total
    window = options.get("window")
    if window is not None and (len(window) != 2 or any(not isinstance(side, int) or side < -1 for side in window)):
        return f"window is {window!r}; it is (left, right), each an int of at least -1 (-1: unlimited)"
    dropout = options.get("dropout")
    if dropout is not None and not 0 <= dropout.p < 1:
        return f"dropout_p is {dropout.p!r}; it has to be at least 0 and below 1"
    mask = options.get("attn_mask")
    if mask is not None and not (_broadcasts(mask, (batch, heads, queries, keys)) and _bool_or_float(mask)):
        return (
            f"attn_mask is {tuple(mask.shape)} of {mask.dtype}; it has to broadcast to (B, N, L, L_kv) = "
            f"{(batch, heads, queries, keys)}, e.g. {(queries, keys)}, {(batch, 1, queries, keys)} or "
            f"{(batch, 1, 1, keys)}, and be bool (True attends) or floating"
        )
    padding = options.get("key_padding_mask")
    if padding is not None and (tuple(padding.shape) != (batch, keys) or padding.dtype != torch.bool):
        return (
            f"key_padding_mask is {tuple(padding.shape)} of {padding.dtype}; it has to be (B, L_kv) = "
            f"{(batch, keys)}, the whole sequence on every rank, and bool (True attends)"
        )
    sinks = options.get("sinks_n")
    if sinks is not None and tuple(sinks.shape) != (heads,):
        return f"sinks_N is {tuple(sinks.shape)}; it has to be ({heads},), one logit per query head"
    return ""


def of_my_heads(options: Mapping[str, Any], seed: Tensor, call: Call) -> dict[str, Any]:
    """The options with this rank's heads of whatever has a head dimension; masks with all four; dropout with its
    seed."""
    mine = dict(options)
    first, size = call.heads.query.offsets[call.rank], call.heads.query.sizes[call.rank]
    if "attn_mask" in mine:
        mask = mine["attn_mask"]
        mask = mask[(None,) * (4 - mask.ndim)]
        mine["attn_mask"] = mask.narrow(1, first, size) if mask.shape[1] > 1 else mask
    if "sinks_n" in mine:
        mine["sinks_n"] = mine["sinks_n"].narrow(0, first, size)
    if "dropout" in mine:
        mine["dropout"] = replace(mine["dropout"], first_head=first, seed=seed)
    return mine


def described(options: Mapping[str, Any]) -> str:
    """The options as text: values where they are short, shapes where they are tensors."""
    return ", ".join(
        f"{name} {tuple(value.shape) if isinstance(value, Tensor) else value}" for name, value in options.items()
    )


def _broadcasts(mask: Tensor, shape: tuple[int, ...]) -> bool:
    return mask.ndim <= 4 and all(
        size in (1, whole) for size, whole in zip(mask.shape[::-1], shape[::-1], strict=False)
    )


def _bool_or_float(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or mask.is_floating_point()
