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
        documents: arguments ``cu_seqlens`` and ``cu_seqlens_padded`` of attention; none where each row is one
            document.
        window: its argument ``window``; none where there is no limit.
        position_of_place_L: position of each place of the sequence in its document.
        document_of_place_L: the number of its document, -1 at padding.
    """

    documents: Mapping[str, Any]
    window: Mapping[str, Any]
    position_of_place_L: Tensor
    document_of_place_L: Tensor

    @classmethod
    def of(cls, *, seq: int, documents: Sequence[tuple[int, int]], window: int) -> Self:
        """Documents of (real tokens, places) end to end, or whole rows; ``window`` keys back, -1 for all."""
        starts = torch.tensor(list(accumulate((places for _, places in documents), initial=0)))
        ends = torch.tensor(list(accumulate((tokens for tokens, _ in documents), initial=0)))
        rooms = list(documents) or [(seq, seq)]
        numbers = [torch.where(torch.arange(places) < tokens, i, -1) for i, (tokens, places) in enumerate(rooms)]
        return cls(
            documents={"cu_seqlens": ends, "cu_seqlens_padded": starts} if documents else {},
            window={"window": (window, -1)} if window >= 0 else {},
            position_of_place_L=torch.cat([torch.arange(places) for _, places in rooms]),
            document_of_place_L=torch.cat(numbers),
        )

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of attention."""
        return {**self.documents, **self.window}

    @property
    def options_by_mask(self) -> dict[str, Any]:
        """Those that mean the same by a mask (L, L). Padding sees nothing, and nobody sees it."""
        document_L = self.document_of_place_L
        seen_LL = (document_L[:, None] == document_L) & (document_L >= 0)
        return {"attn_mask": seen_LL, **self.window}

    @property
    def nan_of_place_L(self) -> Tensor:
        """NaN at padding, else 0: to add to what nobody may read there."""
        return torch.where(self.document_of_place_L < 0, torch.nan, 0.0)

    def to(self, device: str) -> Self:
        """The same, with what is about each place on ``device``; documents are read on the CPU."""
        of_place = {name: getattr(self, name).to(device) for name in ("position_of_place_L", "document_of_place_L")}
        return replace(self, **of_place)
