"""The plan of one dispatch: integers only, made once, replayed as often as needed.

Four numberings meet here. *Sent* rows: one per distinct (token of mine, rank that needs it), by rank, then token.
*Received* rows: the same seen from the other side, by source rank, then token. In both, what a rank sends to itself
comes last: it stays here. *Rows*: one per choice that fell on an expert of mine, by expert, then global token, then
choice. *Entries*: the terms of a sum, so that every sum runs over consecutive entries.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.partition import Partition
from ..layout.sharding import TokenSharding
from .row_index import RowIndex


class IndexSource(Protocol):
    """Where a plan has the index tensors of its received rows from."""

    @property
    def found(self) -> RowIndex | None:
        """They; None before rows have come that tell them."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows of this rank's experts, which are known at once."""
        ...

    @property
    def rides(self) -> tuple[Tensor, ...]:
        """Tensors (t, ...) whose rows travel with those of this rank's tokens, behind their weights."""
        ...

    def came(self, rode: Sequence[Tensor]) -> None:
        """Learn from what rode with the received rows, a tensor (R, ...) for each of ``rides``."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class KnownIndex:
    """The index tensors of a plan that knew all ids when it was made."""

    found: RowIndex

    @property
    def num_rows(self) -> int:
        return self.found.token_of_row_M.shape[0]

    @property
    def rides(self) -> tuple[Tensor, ...]:
        """Nothing."""
        return ()

    def came(self, rode: Sequence[Tensor]) -> None:
        """Nothing to learn."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchMetadata:
    """Where every row of one dispatch comes from and goes to. Made by :func:`plan_dispatch`; holds no activation.

    The plan itself: ``plan`` is the word for it elsewhere, and ``metadata`` the name of the argument that takes it.

    Letters: t tokens of this rank, S rows it sends, R rows it receives, M rows of its experts, e its experts. All
    tensors are int64 on the device of the ids.

    Where a plan by counts is the cheaper one (``plan/counts/rule.py``), ids travel with the rows. What follows from
    the ids of other ranks is then known once a dispatch has finished: ``token_of_row_M``, ``received_of_row_M``,
    ``choice_of_row_M``, ``row_of_entry_M``, ``first_entry_R``. Before, reading one is a RuntimeError, and equality of
    plans is that of what both know.

    Attributes:
        local_shape: (b, l, D), or (l, b, D) for order "LB": the shape of this rank's tokens.
        sharding: who holds which token, uneven offsets included.
        experts: who holds which expert.
        rank: this rank in ``group``.
        group: the expert-parallel process group.
        rows_sent: rows for each rank, one per distinct (token, rank).
        rows_received: rows from each rank.
        expert_BlK: the ids that the plan was made from, as int64. A plan made from them again equals this one.
        rows_per_expert_e: how many rows each of this rank's experts got.
        token_of_sent_S: local token of each sent row.
        sent_of_entry_S: the sent row of each entry of the sums over tokens.
        first_entry_t: the sent rows of local token i are those of the entries from ``first_entry_t[i]`` on.
        row_index: has the five tensors that follow, or will have.
        token_of_row_M: global token of each row.
        received_of_row_M: received row that each row is a copy of.
        choice_of_row_M: which of its token's K choices each row is.
        row_of_entry_M: the row of each entry of the sums over received rows.
        first_entry_R: the rows of received row i are those of the entries from ``first_entry_R[i]`` on.
    """

    local_shape: tuple[int, int, int]
    sharding: TokenSharding
    experts: Partition
    rank: int
    group: dist.ProcessGroup
    rows_sent: tuple[int, ...]
    rows_received: tuple[int, ...]
    expert_BlK: Tensor
    rows_per_expert_e: Tensor
    token_of_sent_S: Tensor
    sent_of_entry_S: Tensor
    first_entry_t: Tensor
    row_index: IndexSource = field(compare=False)  # what it has found is compared

    @property
    def token_of_row_M(self) -> Tensor:
        """(M,) global token of each row."""
        return self.index.token_of_row_M

    @property
    def received_of_row_M(self) -> Tensor:
        """(M,) received row that each row is a copy of."""
        return self.index.received_of_row_M

    @property
    def choice_of_row_M(self) -> Tensor:
        """(M,) which of its token's K choices each row is."""
        return self.index.choice_of_row_M

    @property
    def row_of_entry_M(self) -> Tensor:
        """(M,) row of each entry of the sums over received rows."""
        return self.index.row_of_entry_M

    @property
    def first_entry_R(self) -> Tensor:
        """(R,) where the entries of each received row start."""
        return self.index.first_entry_R

    @property
    def index(self) -> RowIndex:
        """The tensors above, all at once. RuntimeError before rows have come that tell them."""
        found = self.row_index.found
        if found is None:
            raise RuntimeError(
                f"rank {self.rank}: the rows of this plan over {self.group.size()} ranks have not come yet, and the "
                "ids that tell which token and choice each is come with them; dispatch by the plan first "
                "(dispatch(...), or finish() of start_dispatch(...)). rows_per_expert_e is known before"
            )
        return found

    def add_report(self, report: Tensor) -> None:
        """Nothing: this plan was checked when it was made."""

    @property
    def rows_away(self) -> tuple[int, ...]:
        """Rows for each other rank."""
        return (*self.rows_sent[: self.rank], 0, *self.rows_sent[self.rank + 1 :])

    @property
    def rows_from_others(self) -> tuple[int, ...]:
        """Rows from each other rank."""
        return (*self.rows_received[: self.rank], 0, *self.rows_received[self.rank + 1 :])

    @property
    def num_rows(self) -> int:
        """Rows of this rank's experts."""
        return self.row_index.num_rows

    @property
    def num_received(self) -> int:
        """Rows from all ranks."""
        return sum(self.rows_received)

    @property
    def num_tokens(self) -> int:
        """This rank's tokens."""
        return self.local_shape[0] * self.local_shape[1]

    @property
    def spare(self) -> int:
        """Rows of zeros to put behind those received, for a plan that has rows without a source."""
        return 0

    def checked(self, y_tD: Tensor) -> Tensor:
        """The sums of this rank's tokens, as they are: this plan was checked when it was made."""
        return y_tD

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DispatchMetadata):
            return NotImplemented
        found, of_other = self.row_index.found, other.row_index.found
        if found is not None and of_other is not None and found != of_other:
            return False
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.compare)
        return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "DispatchMetadata":
        """A copy in the same process group, which cannot be copied."""
        memo[id(self.group)] = self.group
        return type(self)(**{f.name: deepcopy(getattr(self, f.name), memo) for f in fields(self)})

    __hash__ = None  # type: ignore[assignment]  # tensors compare by value, and they can be written to
