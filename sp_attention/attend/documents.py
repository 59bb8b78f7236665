"""Packed sequences: documents end to end, with padding between them or without."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moe_dispatch.internals import problem_of_dtensors

from ..dtypes import is_integer
from .empty import attend_or_zeros, zeros


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the documents of a packed sequence lie.

    Attributes:
        ends: cumulated real lengths, from 0: ``cu_seqlens``.
        starts: where each document starts, and where the last one's padding ends: ``cu_seqlens_padded``.
        padded: whether that was given.
    """

    ends: tuple[int, ...]
    starts: tuple[int, ...]
    padded: bool = field(repr=False)  # ranks that differ in it only mean the same

    @classmethod
    def read(
        cls, cu_seqlens: Tensor | None, cu_seqlens_padded: Tensor | None, batch: int, lengths: tuple[int, int]
    ) -> tuple["Documents | None", str]:
        """The one reader of cu_seqlens: a host sync unless they are on the CPU.

        Args:
            cu_seqlens, cu_seqlens_padded: as the caller passed them; any integer dtype.
            batch, lengths: B and (L, L_kv).

        Returns:
            The documents, and what is wrong with them, empty where nothing is. None and nothing wrong where neither
            was passed.
        """
        if cu_seqlens is None and cu_seqlens_padded is None:
            return None, ""
        if cu_seqlens is None:
            return (
                None,
                "cu_seqlens_padded without cu_seqlens; pass both, or cu_seqlens alone where nothing is padded",
            )
        if problem := problem_of_dtensors(cu_seqlens=cu_seqlens, cu_seqlens_padded=cu_seqlens_padded):
            return None, problem
        for name, x in (("cu_seqlens", cu_seqlens), ("cu_seqlens_padded", cu_seqlens_padded)):
            if x is not None and (not isinstance(x, Tensor) or x.ndim != 1 or not is_integer(x)):
                got = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"{type(x).__name__}"
                return None, f"{name} is {got}; it has to be a tensor (documents + 1,) of ints"
            if x is not None and x.is_meta:
                return None, f"{name} is on meta, where there are no values to read; pass it on the CPU"
        ends = tuple(cu_seqlens.tolist())
        starts = ends if cu_seqlens_padded is None else tuple(cu_seqlens_padded.tolist())
        documents = cls(ends, starts, cu_seqlens_padded is not None)
        return documents, documents._problem(batch, lengths)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of the real tokens of each document, places in the packed sequence."""
        lengths = (end - start for start, end in pairwise(self.ends))
        return tuple((start, start + length) for start, length in zip(self.starts, lengths, strict=False))

    def _problem(self, batch: int, lengths: tuple[int, int]) -> str:
        """What is wrong with them for tensors of these sizes; empty where nothing is."""
        if batch > 1 or lengths[0] != lengths[1]:
            return (
                f"documents in a batch of {batch} with {lengths[0]} queries and {lengths[1]} keys; pack them into "
                "one row (B = 1) of self-attention, or use key_padding_mask"
            )
        if len(self.ends) < 1 or self.ends[0] != 0 or any(a > b for a, b in pairwise(self.ends)):
            return f"cu_seqlens is {list(self.ends)}; it has to start at 0 and never fall"
        if len(self.starts) != len(self.ends) or any(
            end > start for (_, end), start in zip(self.spans, self.starts[1:], strict=True)
        ):
            return (
                f"cu_seqlens_padded is {list(self.starts)} for cu_seqlens {list(self.ends)}; it needs as many "
                "entries, each document's start, far enough apart for the real tokens"
            )
        if self.starts[0] < 0 or self.starts[-1] > lengths[0] or (not self.padded and self.ends[-1] != lengths[0]):
            return (
                f"documents end at {self.starts[-1]} of a packed sequence of {lengths[0]} tokens; cu_seqlens has to "
                "end at the length, or pass cu_seqlens_padded to say where padding is"
            )
        return ""


def attend_documents(
    attend: Callable[..., Tensor],
    q_BLnH: Tensor,
    k_BLgH: Tensor,
    v_BLgH: Tensor,
    options: Mapping[str, Any],
    documents: Documents,
    options_of_part: Callable[[Mapping[str, Any], tuple[int, int], tuple[int, int]], dict[str, Any]],
) -> Tensor:
    """``attend`` within each document; 0 at padding.

    Args:
        options: as ``attend`` takes them, for the whole sequence.
        documents: where they lie.
        options_of_part: of the options, those of some queries and of some keys: (first place, end) of each.

    Padding takes no part: it is cut away before, so that nothing it holds, NaN included, can reach a result or a
    gradient. The memory is that of the longest document.
    """
    cuts = [0, *(place for span in documents.spans for place in span), q_BLnH.shape[1]]
    sizes = [end - start for start, end in pairwise(cuts)]
    parts = [x_BLnH.split(sizes, dim=1)[1::2] for x_BLnH in (q_BLnH, k_BLgH, v_BLgH)]
    pieces = []
    for (start, end), gap, q_BsnH, k_BsgH, v_BsgH in zip(documents.spans, sizes[:-1:2], *parts, strict=True):
        pieces.append(zeros(gap, q_BLnH, v_BLgH))
        own = options_of_part(options, (start, end), (start, end))
        pieces.append(attend_or_zeros(attend, q_BsnH, k_BsgH, v_BsgH, own))
    pieces.append(zeros(sizes[-1], q_BLnH, v_BLgH))
    # An empty piece that is in the graph even where there is no document.
    pieces.append(attend_or_zeros(attend, q_BLnH[:, :0], k_BLgH[:, :0], v_BLgH[:, :0], options))
    return torch.cat(pieces, dim=1)
