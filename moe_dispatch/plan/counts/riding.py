"""What rides with the rows of a plan by counts, and what the receiver learns from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ids.format import STEP
from ..row_index import Entries, RowIndex, first_entries, rows_in_order
from .facts import CountsFacts
from .rule import NUMBER_STEPS, riding_steps


@dataclass(slots=True, eq=False)
class RidingIndex:
    """The index tensors of received rows, once the first dispatch by the plan has finished. Later ones bring the same
    again: what a rank sends must not depend on what it remembers.

    Attributes:
        facts: what was known before.
        num_rows: of this rank's experts.
        told_tW: of each of this rank's tokens its number and ids, in steps of 4 bytes.
        found: see :class:`IndexSource`.
    """

    facts: CountsFacts
    num_rows: int
    told_tW: Tensor
    found: RowIndex | None = None

    @property
    def rides(self) -> tuple[Tensor, ...]:
        return (self.told_tW,)

    @torch.inference_mode(False)  # the plan may be used outside
    @torch.no_grad()
    def came(self, rode: Sequence[Tensor]) -> None:
        if self.found is None:
            (told_RW,) = rode
            self.found = _index(told_RW, self.facts, self.num_rows)


def told_of_tokens(id_tK: Tensor, facts: CountsFacts) -> Tensor:
    """(t, W) what rides with each token: its number, and its ids."""
    steps = riding_steps(facts.num_choices, facts.num_experts)
    told_tW = torch.empty(
        id_tK.shape[0], steps, dtype=STEP, device=id_tK.device
    )  # nobody reads more than K ids of it
    told_tW[:, 0] = facts.number_t
    told_tW[:, NUMBER_STEPS:].view(facts.id_format.dtype)[:, : facts.num_choices] = id_tK
    return told_tW


def _index(told_RW: Tensor, facts: CountsFacts, num_rows: int) -> RowIndex:
    """Every received row has a choice here, so entries are those of its choices that fell on my experts."""
    token_of_received_R = told_RW[:, 0].to(torch.int64)
    id_RK = told_RW[:, NUMBER_STEPS:].view(facts.id_format.dtype)[:, : facts.num_choices].to(torch.int64)
    mine_RK, num_received = facts.mine_of_id.take(id_RK).view(-1), told_RW.shape[0]
    entries = Entries.of(
        torch.nonzero_static(mine_RK, size=num_rows)[:, 0],
        mine_RK,
        token_of_source=token_of_received_R,
        received_of_source=torch.arange(num_received, device=told_RW.device),
        num_choices=facts.num_choices,
        num_tokens=facts.num_tokens,
    )
    _, order = rows_in_order(entries)
    return RowIndex(**order, first_entry_R=first_entries(entries, num_received))
