"""An ``attend`` on some of the queries: on each run of them with the keys that it sees, so that places from the end
stay what they were."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..work.parts import Part
from .empty import attend_or_zeros, zeros

FIRST_QUERY, FIRST_KEY = "first_query", "first_key"


def attend_parts(
    attend: Callable[..., Tensor],
    q_BLnH: Tensor,
    k_BLgH: Tensor,
    v_BLgH: Tensor,
    options: Mapping[str, Any],
    parts: Iterable[Part],
    options_of_part: Callable[[Mapping[str, Any], tuple[int, int], tuple[int, int]], dict[str, Any]],
) -> Tensor:
    """``attend`` on each part; 0 for queries that are in none. ValueError if it writes to its tensors: parts share
    keys, and queries that did not travel are the caller's own.

    Args:
        options: as ``attend`` takes them, for the whole sequence. Of first_query and first_key only whether they are
            there.
        parts: in the order of the queries.
        options_of_part: of the options, those of some queries and of some keys: (first place, end) of each.
    """
    outs, at, before = [], 0, versions(q_BLnH, k_BLgH, v_BLgH)
    for part in parts:
        queries, keys = (end - start for start, end in (part.queries, part.keys))
        q_BsnH = q_BLnH[:, part.q_row : part.q_row + queries]
        k_BsgH, v_BsgH = (x[:, part.k_row : part.k_row + keys] for x in (k_BLgH, v_BLgH))
        own = options_of_part(options, part.queries, part.keys) | _places(options, part)
        outs.append(zeros(part.q_row - at, q_BLnH, v_BLgH))
        outs.append(attend_or_zeros(attend, q_BsnH, k_BsgH, v_BsgH, own))
        at = part.q_row + queries
    if versions(q_BLnH, k_BLgH, v_BLgH) != before:
        raise ValueError("q, k or v were written to, which further calls and the caller share; write to copies")
    outs.append(zeros(q_BLnH.shape[1] - at, q_BLnH, v_BLgH))
    # An empty piece that is in the graph even where there is no part.
    outs.append(attend_or_zeros(attend, q_BLnH[:, :0], k_BLgH[:, :0], v_BLgH[:, :0], options))
    return torch.cat(outs, dim=1)


def versions(*tensors: Tensor) -> list[int]:
    """How often each was written to; a tensor of inference_mode does not know."""
    return [0 if x.is_inference() else x._version for x in tensors]


def _places(options: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """What options on places say of a part. Those from the end count from its last key, not from the last query's
    own."""
    own: dict[str, Any] = {}
    if "window" in options:
        left, right = options["window"]
        own["window"] = (left + part.beyond if left >= 0 else -1, right - part.beyond if right >= 0 else -1)
    firsts = (part.queries[0] - part.start[0], part.keys[0] - part.start[1])
    for name, first in zip((FIRST_QUERY, FIRST_KEY), firsts, strict=True):
        if name in options:
            own[name] = first
    return own
