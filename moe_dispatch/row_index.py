"""From the routing of a group to the index tensors of one rank's plan."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .partition import Partition
from .sharding import TokenSharding


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """The routing of the whole group as one rank sees it. G: tokens of the group, rank after rank. P: ranks."""

    rank: int
    sharding: TokenSharding
    needed_tP: Tensor  # does rank P need my token t
    here_GK: Tensor  # did this choice fall on an expert of mine
    expert_GK: Tensor  # my expert of each such choice, counted from 0; the number of my experts elsewhere
    rows_per_expert_e: Tensor

    @classmethod
    def of(cls, expert_GK: Tensor, sharding: TokenSharding, experts: Partition, rank: int) -> "Routes":
        device, ranks, num_mine = expert_GK.device, len(experts), experts.sizes[rank]
        no_rank = torch.full((1,), ranks, device=device)
        rank_of_id = torch.cat([experts.owner(torch.arange(experts.total, device=device)), no_rank])
        rank_GK = rank_of_id[expert_GK]  # id -1 reads the last place
        rank_tK = rank_GK.split(sharding.local_sizes)[rank]
        needed_tP = torch.zeros(len(rank_tK), ranks + 1, dtype=torch.bool, device=device).scatter_(1, rank_tK, True)
        here_GK = rank_GK == rank
        mine_GK = torch.where(here_GK, expert_GK - experts.offsets[rank], num_mine)
        rows_e = torch.zeros(num_mine + 1, dtype=torch.int64, device=device)
        rows_e = rows_e.scatter_add_(0, mine_GK.flatten(), torch.ones_like(mine_GK).flatten())
        return cls(
            rank=rank,
            sharding=sharding,
            needed_tP=needed_tP[:, :ranks],
            here_GK=here_GK,
            expert_GK=mine_GK,
            rows_per_expert_e=rows_e[:num_mine].clone(),
        )

    def counts_to_host(self, word_P: Tensor) -> tuple[tuple[int, ...], ...]:
        """Status words, rows sent and received per rank, rows per expert: the one copy to the host."""
        received = [here_tK.any(1).sum() for here_tK in self.here_GK.split(self.sharding.local_sizes)]
        counts = [word_P, self.needed_tP.sum(0), torch.stack(received), self.rows_per_expert_e]
        on_host = torch.cat(counts).cpu().split([len(count) for count in counts])
        return tuple(tuple(count.tolist()) for count in on_host)

    def index_sent(self, num_sent: int) -> dict[str, Tensor]:
        """My tokens -> sent rows, and back."""
        needed_Pt = self.needed_tP.T.contiguous()
        sent_Pt = (needed_Pt.flatten().cumsum(0) - 1).view_as(needed_Pt)
        token_of_entry_S, rank_of_entry_S = torch.nonzero_static(self.needed_tP, size=num_sent).unbind(1)
        return {
            "token_of_sent_S": torch.nonzero_static(needed_Pt, size=num_sent)[:, 1].contiguous(),
            "sent_of_entry_S": sent_Pt[rank_of_entry_S, token_of_entry_S],
            "first_entry_t": _starts(self.needed_tP.sum(1)),
        }

    def index_rows(self, num_received: int, num_rows: int) -> dict[str, Tensor]:
        """Received rows -> rows of my experts, and back."""
        received_of_G = self.here_GK.any(1).cumsum(0) - 1
        token_of_G = self.sharding.stacked_tokens(self.here_GK.device)
        g_of_entry_M, choice_of_entry_M = torch.nonzero_static(self.here_GK, size=num_rows).unbind(1)
        expert_of_entry_M = self.expert_GK[g_of_entry_M, choice_of_entry_M]
        # Entries are in (received row, choice) order, so a stable sort leaves the choices of a token in order.
        entry_of_row_M = (expert_of_entry_M * self.sharding.num_tokens + token_of_G[g_of_entry_M]).argsort(
            stable=True
        )
        g_of_row_M = g_of_entry_M[entry_of_row_M]
        row_of_entry_M = torch.empty_like(entry_of_row_M)
        row_of_entry_M[entry_of_row_M] = torch.arange(num_rows, device=entry_of_row_M.device)
        g_of_received_R = torch.nonzero_static(self.here_GK.any(1), size=num_received)[:, 0]
        return {
            "token_of_row_M": token_of_G[g_of_row_M],
            "received_of_row_M": received_of_G[g_of_row_M],
            "choice_of_row_M": choice_of_entry_M[entry_of_row_M],
            "row_of_entry_M": row_of_entry_M,
            "first_entry_R": _starts(self.here_GK.sum(1))[g_of_received_R],
        }


def _starts(count_N: Tensor) -> Tensor:
    """Where each of consecutive runs of these lengths starts."""
    return count_N.cumsum(0) - count_N
