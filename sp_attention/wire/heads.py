"""Which key/value heads go with which query heads, on which rank."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from moe_dispatch import Partition

from ..dtypes import dtype_of_sums


@dataclass(frozen=True, slots=True)
class GroupedHeads:
    """N query heads over ranks, and the G key/value heads that they need (grouped-query attention: N / G queries
    share one).

    Query head i uses key/value head ``i // (N / G)``. A group may straddle ranks: then each of them gets that
    key/value head.

    Attributes:
        query: query heads of each rank.
        num_kv: G.
    """

    query: Partition
    num_kv: int

    @property
    def kv_ranges(self) -> tuple[range, ...]:
        """The key/value heads that each rank needs: neighbours may share one, a rank without query heads needs
        none."""
        per_group = self.query.total // max(self.num_kv, 1)
        return tuple(
            range(start // per_group, (start + size - 1) // per_group + 1) if size else range(0)
            for start, size in zip(self.query.offsets, self.query.sizes, strict=True)
        )

    @property
    def kv_spans(self) -> tuple[tuple[int, int], ...]:
        """The first key/value head that each rank needs, and how many."""
        return tuple((needed.start, len(needed)) for needed in self.kv_ranges)

    @property
    def latent_spans(self) -> tuple[tuple[int, int], ...]:
        """The same of a latent, which is one head that serves all query heads."""
        return tuple((0, min(size, 1)) for size in self.query.sizes)

    @property
    def kv_sent(self) -> Partition:
        """How many key/value heads go to each rank."""
        return Partition(len(needed) for needed in self.kv_ranges)

    def kv_by_rank(self, x_BlGH: Tensor) -> Tensor:
        """The heads that each rank needs, side by side: (..., G, H) -> (..., kv_sent.total, H)."""
        ranges = [needed for needed in self.kv_ranges if needed] or [range(0)]
        if [head for needed in ranges for head in needed] == list(range(self.num_kv)):
            return x_BlGH
        heads = [torch.arange(needed.start, needed.stop, device=x_BlGH.device) for needed in ranges]
        return copy_heads(x_BlGH, torch.cat(heads))

    def has_whole_groups(self, rank: int) -> bool:
        """Whether this rank's query heads are as many for each of its key/value heads, in their order."""
        per_group, first = self.query.total // max(self.num_kv, 1), self.kv_ranges[rank].start
        start, size = self.query.offsets[rank], self.query.sizes[rank]
        shared = size // max(len(self.kv_ranges[rank]), 1)
        return [(start + i) // per_group - first for i in range(size)] == [i // shared for i in range(size)]

    def kv_of_query(self, rank: int, device: torch.device) -> Tensor:
        """(n,) which of this rank's key/value heads each of its query heads uses."""
        start, size = self.query.offsets[rank], self.query.sizes[rank]
        query = torch.arange(start, start + size, device=device)
        return query // (self.query.total // max(self.num_kv, 1)) - self.kv_ranges[rank].start

    def kv_for_queries(self, x_BLgH: Tensor, rank: int) -> Tensor:
        """This rank's key/value heads as ``attend`` needs them: whole groups as they are, else one head per query
        head."""
        return x_BLgH if self.has_whole_groups(rank) else copy_heads(x_BLgH, self.kv_of_query(rank, x_BLgH.device))


def heads_of_call(
    num_query: int, num_kv: tuple[int, int], heads: Partition | None, ranks: int
) -> tuple[GroupedHeads, str]:
    """The heads by which this rank's tensors are measured, and what is wrong with ``heads``; empty where nothing is.

    A rank that has one of its numbers wrong still has to send what its peers wait for. They have it right, so it is
    the first pair below that can be: ``heads`` before the queries, the keys before the values.

    Args:
        num_query, num_kv: heads of this rank's queries, and of its keys and its values.
        heads: as the caller gave it.
        ranks: of the group.

    Raises:
        ValueError: no pair can be.
    """
    given = [heads.total] if isinstance(heads, Partition) and len(heads) == ranks else []
    for total, num in product([*given, num_query], num_kv):
        if num > 0 and total % num == 0 and (total or not num_query):
            break
    else:
        raise ValueError(
            f"{num_query} query heads over {num_kv[0]} key/value heads; each key/value head serves the same number "
            "of query heads, so their number has to divide that of the query heads"
        )
    if heads is None or [total] == given:
        return GroupedHeads(heads or Partition.balanced(total, ranks), num), ""
    return GroupedHeads(Partition.balanced(total, ranks), num), (
        f"heads is {heads}; it has to be a Partition of the {total} query heads over {ranks} ranks"
    )


def copy_heads(x_BlGH: Tensor, head_of_copy: Tensor) -> Tensor:
    """(..., G, H) -> (..., copies, H). The gradient of a head is the sum over its copies."""
    dtype = dtype_of_sums(x_BlGH)
    if x_BlGH.requires_grad and dtype != x_BlGH.dtype:
        # index_select's gradient adds in the dtype of its input: add in float32, and round once.
        return x_BlGH.to(dtype).index_select(2, head_of_copy).to(x_BlGH.dtype)
    return x_BlGH.index_select(2, head_of_copy)
