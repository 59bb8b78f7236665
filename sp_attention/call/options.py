"""The options of one call: what was given, whether ``attend`` can honour it, and what is said and passed of it.

What differs from option to option is in option_records.py. This file knows none by name.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attend.documents import Documents
from ..blocks.dropout import draw_seed
from ..work.runs import Run
from .attend_arguments import FIRST_HEAD, takes
from .call_inputs import Inputs
from .option_records import OPTIONS, Option

Given = Sequence[tuple[Option, Any]]  # options that ask for something, each with the value that the caller passed


def given_options(**value_of_name: Any) -> Given:
    """Those that ask for something, by the names of ``ulysses_attention``."""
    return [(option, value_of_name[option.name]) for option in OPTIONS if option.is_given(value_of_name[option.name])]


def problem_of_attend(attend: Callable[..., Tensor], given: Given) -> str:
    """Why ``attend`` cannot honour every option; empty where it can. An option is honoured or refused, never
    ignored."""
    if attend is F.scaled_dot_product_attention:
        return (
            "attend is torch's scaled_dot_product_attention, which takes (B, n, L, H) and would read lengths as "
            "heads; leave attend out to use it in the right layout"
        )
    try:
        ignored = [option.name_in_attend for option, _ in given if not takes(attend, option.name_in_attend)]
        takes(attend, FIRST_HEAD)
    except (TypeError, ValueError):
        return f"attend is {attend!r}, whose arguments cannot be seen; pass a function attend(q, k, v, **options)"
    if ignored:
        return (
            f"attend {getattr(attend, '__name__', attend)!r} takes no {', '.join(ignored)}; give it arguments of "
            "these names, or leave the options out"
        )
    return ""


def problem_of_options(given: Given, inputs: Inputs) -> str:
    """What is wrong with the first option that has something wrong; empty where nothing is."""
    for option, value in given:
        if problem := option.problem(value, inputs):
            return problem
    return ""


def facts_of_call(inputs: Inputs, given: Given, documents: Documents | None) -> str:
    """What all ranks have to agree on, as text."""
    learned = [value for _, value in given if isinstance(value, Tensor)]
    # A rank that takes no part in backward, of the exchange there or of the one back, would leave its peers waiting.
    of_tensors, of_options = (
        torch.is_grad_enabled() and any(x.requires_grad for x in tensors) for tensors in (inputs.tensors, learned)
    )
    of_given = ", ".join([f"{option.name_in_attend} {option.fact(value)}" for option, value in given])
    return (
        f"{inputs.facts}; {of_given}; {documents or 'one document'}; gradients of {inputs.names} {of_tensors}, of "
        f"options {of_options}"
    )


def seed_of(given: Given, device: torch.device) -> Tensor:
    """() int64: a random number where an option is drawn, else 0; then no random state moves."""
    if any(option.is_drawn for option, _ in given):
        return draw_seed(device)
    return torch.zeros((), dtype=torch.int64, device=device)


def options_of_my_heads(given: Given, inputs: Inputs, seed: Tensor) -> dict[str, Any]:
    """The options as ``attend`` takes them on this rank.

    Args:
        seed: () int64, the same on every rank.
    """
    return {option.name_in_attend: option.of_heads(value, inputs, seed) for option, value in given}


def options_of_part(options: Mapping[str, Any], queries: Run, keys: Run) -> dict[str, Any]:
    """What :func:`options_of_my_heads` gave, as ``attend`` takes it for some queries and keys: (first place, end) of
    each."""
    cut = dict(options)
    for option in OPTIONS:
        if option.name_in_attend in cut:
            cut[option.name_in_attend] = option.of_part(cut[option.name_in_attend], queries, keys)
    return cut
