"""The terms of a plan: what the ranks have to agree about before any of them knows where a row goes."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..layout.partition import Partition
from ..layout.sharding import TokenSharding
from ..wire.exchange import check_group
from .ids.format import MOST_EXPERTS
from .ids.group_tokens import GroupTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Tokens and experts of a group, and the rows to move.

    Attributes:
        sharding: the tokens, one shard per rank.
        experts: the experts that each rank holds.
        dim: width of the rows.
        dtype: of the rows, if the caller knows it already.
        also: what the ranks have to agree about besides, as text.
        of_whole: the facts of the larger call that this plan is a part of, told in place of the facts of these
            terms; empty for a plan by itself.

    Raises:
        ValueError: a width or a number of experts that cannot be.
    """

    sharding: TokenSharding
    experts: Partition
    dim: int
    dtype: torch.dtype | None = None
    also: str = ""
    of_whole: str = ""

    def __post_init__(self) -> None:
        check_experts(self.experts)
        if not isinstance(self.dim, int) or self.dim < 1:
            raise ValueError(
                f"dim is {self.dim!r}; it is the width of the rows to move, an int of at least 1, e.g. "
                "x_BlD.shape[-1]"
            )

    def check(self, group: dist.ProcessGroup) -> None:
        """ValueError unless the terms describe the ranks of ``group``. Every rank sees it, before any collective."""
        check_group(group, self.sharding.num_ranks, "the token sharding")
        check_group(group, len(self.experts), "the partition of experts")

    def facts(self, num_choices: int) -> str:
        """What the ranks have to agree about, as text."""
        return self.of_whole or self.sharding.keep(("facts", *self.key(num_choices)), lambda: self._told(num_choices))

    def tokens(self, rank: int, num_choices: int, device: torch.device) -> GroupTokens:
        """The tokens of the group as ``rank`` plans with them, K choices each. Made once and kept by the sharding, so
        that all layers of a step use the same."""
        return self.sharding.keep(
            (GroupTokens, rank, device, *self.key(num_choices)),
            lambda: GroupTokens.made(
                self.sharding, self.experts, rank, num_choices, facts=self.facts(num_choices), device=device
            ),
        )

    def key(self, num_choices: int) -> tuple[Hashable, ...]:
        """All but the sharding, which keeps what is made: held by itself, it would never be freed."""
        return self.experts, self.dim, self.dtype, self.also, self.of_whole, num_choices

    def _told(self, num_choices: int) -> str:
        known = [self.also] * bool(self.also) + [str(self.dtype)] * (self.dtype is not None)
        return ", ".join(
            [*known, f"K = {num_choices}, dim = {self.dim}, experts = {self.experts.sizes}, {self.sharding}"]
        )


def check_experts(experts: Partition) -> None:
    """ValueError unless ids of these experts can travel."""
    if not 1 <= experts.total <= MOST_EXPERTS:
        raise ValueError(f"{experts.total} experts; a group can have 1 to {MOST_EXPERTS}")
