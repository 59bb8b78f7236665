"""Consecutive things cut into one piece per rank: tokens, heads, experts."""

from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

from .frozen import Frozen
from .on_device import ints_on


def check_count(value: object, name: str, least: int) -> None:
    """Raise ValueError unless ``value`` is an int of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; it has to be an int of at least {least}")


class Partition(Frozen):
    """``total`` consecutive things cut into contiguous pieces, one per rank; a piece may be empty.

    Args:
        sizes: how many things each rank holds, in rank order.

    Attributes:
        sizes: as given.
        offsets: index of each rank's first thing, one per rank.
        total: of all ranks.

    Raises:
        ValueError: no pieces, or a size that is not an int >= 0.
    """

    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    total: int

    _defining = ("sizes",)
    __slots__ = ("offsets", "sizes", "total")

    def __init__(self, sizes: Iterable[int]) -> None:
        object.__setattr__(self, "sizes", tuple(sizes))
        if not self.sizes:
            raise ValueError(
                "a Partition without pieces; it needs one size per rank, e.g. Partition((4,)) for one rank"
            )
        for rank, size in enumerate(self.sizes):
            if type(size) is not int or size < 0:  # the whole tuple is text only for an error: it can be long
                check_count(size, f"size {rank} of Partition({self.sizes})", least=0)
        # Stored, not recomputed: every call asks for them, and there may be a thousand ranks.
        object.__setattr__(self, "offsets", tuple(accumulate(self.sizes[:-1], initial=0)))
        object.__setattr__(self, "total", sum(self.sizes))

    @classmethod
    def even(cls, total: int, ranks: int) -> "Partition":
        """Equal pieces; a remainder is refused."""
        check_count(total, "total", least=0)
        check_count(ranks, "ranks", least=1)
        if total % ranks:
            raise ValueError(
                f"{total} things do not split evenly over {ranks} ranks; "
                f"use Partition.balanced({total}, {ranks}) for pieces that differ by one"
            )
        return cls((total // ranks,) * ranks)

    @classmethod
    def balanced(cls, total: int, ranks: int) -> "Partition":
        """Pieces that differ by at most one, the larger first, as ``torch.tensor_split`` cuts."""
        check_count(total, "total", least=0)
        check_count(ranks, "ranks", least=1)
        return cls(total // ranks + (rank < total % ranks) for rank in range(ranks))

    @classmethod
    def chunked(cls, total: int, ranks: int) -> "Partition":
        """Pieces of ``ceil(total / ranks)``, the last ones short or empty, as ``torch.chunk`` and DTensor's ``Shard``
        cut."""
        check_count(total, "total", least=0)
        check_count(ranks, "ranks", least=1)
        size = -(-total // ranks)
        return cls(min(size, max(0, total - rank * size)) for rank in range(ranks))

    def __len__(self) -> int:
        return len(self.sizes)

    def owner(self, index: Tensor) -> Tensor:
        """Rank that holds each ``index``; ``index`` has any shape, with values in [0, total)."""
        ends = ints_on(self.offsets[1:], index.device)
        return torch.bucketize(index, ends, right=True)
