"""From the routing of a group to the index tensors of one rank's plan."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .ids.group_tokens import GroupTokens


@dataclass(frozen=True, slots=True)
class SentRows:
    """Which peer needs which of my tokens. Known before the ids of the others have come.

    P: peers; t: my tokens.
    """

    tokens: GroupTokens
    needed_Pt: Tensor

    @classmethod
    def of(cls, id_tK: Tensor, tokens: GroupTokens) -> "SentRows":
        """``id_tK``: expert ids plus one, 0 for "no expert"."""
        peer_tK = tokens.peer_of_id_E.index_select(0, id_tK.flatten()).view(id_tK.shape)
        needed = torch.zeros(len(tokens.rank_of_peer) + 1, len(id_tK), dtype=torch.bool, device=id_tK.device)
        return cls(tokens, needed.scatter_(0, peer_tK.T, True)[1:])

    @property
    def count_P(self) -> Tensor:
        """Rows for each peer."""
        return self.needed_Pt.sum(1)

    def index(self, num_sent: int) -> dict[str, Tensor]:
        """My tokens -> sent rows, and back."""
        peer_of_sent_S, token_of_sent_S = torch.nonzero_static(self.needed_Pt, size=num_sent).unbind(1)
        token_of_sent_S = token_of_sent_S.contiguous()
        # By token, then rank: the order of a sum does not depend on where the token lives.
        ranks, num_tokens = self.needed_Pt.shape
        key_of_sent_S = self.tokens.rank_of_peer_P.index_select(0, peer_of_sent_S).add(token_of_sent_S, alpha=ranks)
        key_of_entry_S, sent_of_entry_S = key_of_sent_S.sort()
        return {
            "token_of_sent_S": token_of_sent_S,
            "sent_of_entry_S": sent_of_entry_S,
            "first_entry_t": starts(key_of_entry_S, num_tokens, step=ranks),
        }


@dataclass(frozen=True, slots=True)
class ReceivedRows:
    """Which choices of the group's tokens fell on my experts.

    G: tokens of the group, in the order of :class:`GroupTokens`.
    """

    tokens: GroupTokens
    mine_GK: Tensor  # flat: 1 + my expert of each choice; 0 for the choices that fell elsewhere
    received_before_G1: Tensor  # rows that came before each token, and of all

    @classmethod
    def of(cls, id_GK: Tensor, tokens: GroupTokens) -> "ReceivedRows":
        """``id_GK``: expert ids plus one, 0 for "no expert"."""
        mine_GK = tokens.mine_of_id_E.index_select(0, id_GK.view(-1))
        received_before_G1 = mine_GK.new_zeros(len(id_GK) + 1)
        torch.cumsum(mine_GK.view(id_GK.shape).any(1), 0, out=received_before_G1[1:])
        return cls(tokens, mine_GK, received_before_G1)

    @property
    def count_1(self) -> Tensor:
        """Rows of all my experts."""
        return self.mine_GK.count_nonzero().view(1)

    @property
    def received_before_P1(self) -> Tensor:
        """Rows that came from before each peer, and from all."""
        return self.received_before_G1.index_select(0, self.tokens.start_P1)

    def index(self, num_received: int, num_rows: int) -> dict[str, Tensor]:
        """Received rows -> rows of my experts, and back."""
        tokens = self.tokens
        # Choices are in (received row, choice) order, so a stable sort leaves those of a token in order.
        flat_of_entry_M = torch.nonzero_static(self.mine_GK, size=num_rows)[:, 0]
        g_of_entry_M = flat_of_entry_M // tokens.num_choices
        token_of_entry_M = tokens.token_of_G.index_select(0, g_of_entry_M)
        mine_of_entry_M = self.mine_GK.index_select(0, flat_of_entry_M)
        choice_of_entry_M = flat_of_entry_M.sub(g_of_entry_M, alpha=tokens.num_choices)
        received_of_entry_M = self.received_before_G1.index_select(0, g_of_entry_M)
        entry_M = torch.arange(num_rows, device=mine_of_entry_M.device)
        # Every received row has an entry, so the least one is where it starts; ``starts`` takes 5 times as long.
        first_entry_R = entry_M.new_full((num_received,), num_rows).scatter_reduce_(
            0, received_of_entry_M, entry_M, "amin"
        )
        return {
            **rows_of_entries(tokens, mine_of_entry_M, token_of_entry_M, received_of_entry_M, choice_of_entry_M),
            "first_entry_R": first_entry_R,
        }


def rows_of_entries(
    tokens: GroupTokens,
    mine_of_entry_M: Tensor,
    token_of_entry_M: Tensor,
    received_of_entry_M: Tensor,
    choice_of_entry_M: Tensor,
) -> dict[str, Tensor]:
    """Entries -> rows: by expert, then global token, then choice; ``mine`` counts from 1, and is larger than all
    experts where an entry belongs to none."""
    key_of_entry_M = token_of_entry_M.add(mine_of_entry_M, alpha=max(tokens.num_tokens, 1))
    key_of_row_M, entry_of_row_M = key_of_entry_M.sort(stable=True)
    return {
        "rows_per_expert_e": torch.searchsorted(key_of_row_M, tokens.first_key_e1).diff(),
        "token_of_row_M": token_of_entry_M.index_select(0, entry_of_row_M),
        "received_of_row_M": received_of_entry_M.index_select(0, entry_of_row_M),
        "choice_of_row_M": choice_of_entry_M.index_select(0, entry_of_row_M),
        "row_of_entry_M": inverse(entry_of_row_M),
    }


def starts(key_of_entry: Tensor, num_things: int, step: int = 1) -> Tensor:
    """Where the entries of each thing start; entries are in the order of their keys, and thing i has those from
    ``i * step`` on."""
    first_keys = torch.arange(0, num_things * step, step, device=key_of_entry.device)
    return torch.searchsorted(key_of_entry, first_keys)


def inverse(permutation: Tensor) -> Tensor:
    """Where each index stands in the permutation."""
    return torch.empty_like(permutation).scatter_(
        0, permutation, torch.arange(len(permutation), device=permutation.device)
    )
