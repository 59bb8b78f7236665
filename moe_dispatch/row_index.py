"""From the routing of a group to the index tensors of one rank's plan."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Grid
from .partition import Partition


@dataclass(frozen=True, slots=True)
class Departures:
    """Which rank needs which of my tokens. Known before the routing of the others has come.

    P: ranks, t: my tokens.
    """

    needed_Pt: Tensor

    @classmethod
    def of(cls, expert_tK: Tensor, grid: Grid) -> "Departures":
        # 1 + rank; id -1 gives 0. Contiguous, or it warns and copies.
        place_tK = torch.bucketize(expert_tK.contiguous(), grid.first_expert_P, right=True)
        needed = torch.zeros(len(grid.first_expert_P) + 1, len(expert_tK), dtype=torch.bool, device=expert_tK.device)
        return cls(needed.scatter_(0, place_tK.T, True)[1:])

    @property
    def count_P(self) -> Tensor:
        """Rows for each rank."""
        return self.needed_Pt.sum(1)

    def index(self, num_sent: int) -> dict[str, Tensor]:
        """My tokens -> sent rows, and back."""
        token_of_sent_S = torch.nonzero_static(self.needed_Pt, size=num_sent)[:, 1].contiguous()
        return {
            "token_of_sent_S": token_of_sent_S,
            "sent_of_entry_S": token_of_sent_S.argsort(stable=True),
            "first_entry_t": _starts(self.needed_Pt.sum(0)),
        }


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Which choices of the group's tokens fell on my experts.

    G: tokens of the group, rank after rank.
    """

    grid: Grid
    place_GK: Tensor  # 1 + my expert of each choice; 0 for the choices that fell elsewhere
    received_before_G1: Tensor  # rows that came before each token, and of all
    rows_per_expert_e: Tensor

    @classmethod
    def of(cls, id_GK: Tensor, grid: Grid, experts: Partition, rank: int) -> "Arrivals":
        """``id_GK``: expert ids plus one, 0 for "no expert"."""
        num_mine = experts.sizes[rank]
        place_GK = (id_GK - experts.offsets[rank]).clamp_(0, num_mine + 1)
        place_GK.masked_fill_(place_GK > num_mine, 0)
        rows_per_place = torch.zeros(num_mine + 1, dtype=torch.int64, device=id_GK.device)
        rows_per_place.scatter_add_(0, place_GK.view(-1), torch.ones_like(place_GK).view(-1))
        received_before_G1 = torch.zeros(len(id_GK) + 1, dtype=torch.int64, device=id_GK.device)
        torch.cumsum(place_GK.any(1), 0, out=received_before_G1[1:])
        return cls(grid, place_GK, received_before_G1, rows_per_place[1:])

    @property
    def received_before_P1(self) -> Tensor:
        """Rows that came from the ranks before each rank, and from all."""
        return self.received_before_G1.index_select(0, self.grid.start_P1)

    def index(self, num_received: int, num_rows: int, num_tokens: int) -> dict[str, Tensor]:
        """Received rows -> rows of my experts, and back. ``num_tokens``: of the whole grid."""
        place, num_choices = self.place_GK.view(-1), self.place_GK.shape[1]
        token_of_G = self.grid.token_of_G
        # Choices are in (received row, choice) order, so a stable sort leaves those of a token in order.
        flat_of_entry_M = torch.nonzero_static(place, size=num_rows)[:, 0]
        key_M = place[flat_of_entry_M] * num_tokens + token_of_G[flat_of_entry_M // num_choices]
        entry_of_row_M = key_M.argsort(stable=True)
        row_M = torch.arange(num_rows, device=place.device)
        flat_of_row_M = flat_of_entry_M[entry_of_row_M]
        g_of_row_M = flat_of_row_M // num_choices
        here_G = self.received_before_G1.diff()
        g_of_received_R = torch.nonzero_static(here_G, size=num_received)[:, 0]
        return {
            "token_of_row_M": token_of_G[g_of_row_M],
            "received_of_row_M": self.received_before_G1[g_of_row_M],
            "choice_of_row_M": flat_of_row_M - g_of_row_M * num_choices,
            "row_of_entry_M": torch.empty_like(row_M).scatter_(0, entry_of_row_M, row_M),
            "first_entry_R": _starts((self.place_GK > 0).sum(1)[g_of_received_R]),
        }


def _starts(count_N: Tensor) -> Tensor:
    """Where each of consecutive runs of these lengths starts."""
    return count_N.cumsum(0) - count_N
