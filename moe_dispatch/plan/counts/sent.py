"""Which rank needs which of my tokens, by sorting my choices: nothing here is as long as ranks times tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..row_index import inverse
from .facts import CountsFacts


@dataclass(frozen=True, slots=True)
class SentByChoice:
    """My choices (C = t K) in the order of their tokens, then of the ranks that they fall on.

    The first choice of each (token, rank) stands for its row; all others, and those of no expert, for none.
    """

    facts: CountsFacts
    rows_until_C: Tensor  # rows of the choices before and of this one: 1 + the number of its entry
    place_of_sorted_C: Tensor  # places in this order, sorted by the peer; those without a row come last
    before_P1: Tensor  # sorted places before each peer's, and before those without a row

    @classmethod
    def of(cls, id_tK: Tensor, facts: CountsFacts) -> "SentByChoice":
        """``id_tK``: expert ids, -1 for "no expert"."""
        ranks = facts.num_ranks
        rank_tK = facts.rank_of_id.take(id_tK).sort(1).values
        peer_tK = facts.peer_of_rank_P1.take(rank_tK)
        peer_tK[:, 1:].masked_fill_(rank_tK[:, 1:] == rank_tK[:, :-1], ranks)
        peer_C = peer_tK.flatten()
        sorted_peer_C, place_of_sorted_C = peer_C.sort(stable=True)
        before_P1 = torch.searchsorted(sorted_peer_C, facts.rank_P1)
        return cls(facts, (peer_C != ranks).cumsum(0), place_of_sorted_C, before_P1)

    @property
    def count_P(self) -> Tensor:
        """Rows for each rank."""
        return self.before_P1.diff().index_select(0, self.facts.peer_of_rank_P1[:-1])

    def index(self, num_sent: int) -> dict[str, Tensor]:
        """My tokens -> sent rows, and back."""
        num_choices = self.facts.num_choices
        place_of_sent_S = self.place_of_sorted_C[:num_sent]
        entry_of_sent_S = self.rows_until_C.index_select(0, place_of_sent_S).sub_(1)
        first_entry_t = torch.zeros_like(self.facts.number_t, dtype=torch.int64)
        first_entry_t[1:] = self.rows_until_C[num_choices - 1 :: num_choices][:-1]
        return {
            "token_of_sent_S": place_of_sent_S // num_choices,
            "sent_of_entry_S": inverse(entry_of_sent_S),
            "first_entry_t": first_entry_t,
        }
