"""Documents in the rows of a batch, or whole rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packing:
    """Where documents lie in a sequence, and what follows for attention, positions and labels.

    Attributes:
        documents: arguments ``cu_seqlens`` and ``cu_seqlens_padded`` of ``ulysses_attention``; none where each row is
            one document.
        window: its argument ``window``; none where there is no limit.
        position_of_place_L: position of each place of the sequence in its document.
    """

    documents: Mapping[str, Any]
    window: Mapping[str, Any]
    position_of_place_L: Tensor

    @classmethod
    def of(cls, *, seq: int, documents: Sequence[tuple[int, int]], window: int) -> Self:
        """Documents of (real tokens, places) end to end, or whole rows; ``window`` keys back, -1 for all."""
        starts = torch.tensor(list(accumulate((places for _, places in documents), initial=0)))
        ends = torch.tensor(list(accumulate((tokens for tokens, _ in documents), initial=0)))
        lengths = [places for _, places in documents] or [seq]
        return cls(
            documents={"cu_seqlens": ends, "cu_seqlens_padded": starts} if documents else {},
            window={"window": (window, -1)} if window >= 0 else {},
            position_of_place_L=torch.cat([torch.arange(length) for length in lengths]),
        )

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ``ulysses_attention``."""
        return {**self.documents, **self.window}

    def to(self, device: str) -> Self:
        """The same, with positions on ``device``; documents are read on the CPU."""
        return replace(self, position_of_place_L=self.position_of_place_L.to(device))
