"""From the routing of a group to the index tensors of one rank's plan."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..fused.choice import launched, runs_fused
from .ids.group_tokens import GroupTokens
from .ids.sent_pairs import SentPairs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowIndex:
    """Received rows -> rows of my experts, and back: what a plan knows of rows only once all ids have come. Each
    tensor is told at :class:`DispatchMetadata`."""

    token_of_row_M: Tensor
    received_of_row_M: Tensor
    choice_of_row_M: Tensor
    row_of_entry_M: Tensor
    first_entry_R: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RowIndex):
            return NotImplemented
        return all(torch.equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class SentRows:
    """Which peer needs which of my tokens. Known before the ids of the others have come.

    P: peers; t: my tokens.
    """

    tokens: GroupTokens
    needed_Pt: Tensor

    @classmethod
    def of(cls, id_tK: Tensor, tokens: GroupTokens) -> "SentRows":
        """``id_tK``: expert ids, -1 for "no expert"."""
        peer_tK = tokens.peer_of_id.take(id_tK)
        needed = torch.zeros(len(tokens.rank_of_peer) + 1, id_tK.shape[0], dtype=torch.bool, device=id_tK.device)
        return cls(tokens, needed.scatter_(0, peer_tK.T, True)[1:])

    @property
    def count_P(self) -> Tensor:
        """Rows for each peer."""
        return self.needed_Pt.sum(1)

    def index(self, num_sent: int, pairs: SentPairs) -> dict[str, Tensor]:
        """My tokens -> sent rows, and back."""
        pair_of_sent_S = torch.nonzero_static(self.needed_Pt.view(-1), size=num_sent)[:, 0]
        token_of_sent_S, key_of_sent_S = pairs.token_and_key_2N.gather(1, pair_of_sent_S.expand(2, -1)).unbind(0)
        # By token, then rank: the order of a sum does not depend on where the token lives.
        key_of_entry_S, sent_of_entry_S = key_of_sent_S.sort()
        return {
            "token_of_sent_S": token_of_sent_S,
            "sent_of_entry_S": sent_of_entry_S,
            "first_entry_t": torch.searchsorted(key_of_entry_S, pairs.first_key_t),
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
        """``id_GK``: as :meth:`IdsExchange.wait` gives them."""
        mine_GK = tokens.mine_of_id.take(id_GK)
        received_before_G1 = mine_GK.new_zeros(id_GK.shape[0] + 1)
        torch.cumsum(mine_GK.any(1), 0, out=received_before_G1[1:])
        return cls(tokens, mine_GK.view(-1), received_before_G1)

    @property
    def count_1(self) -> Tensor:
        """Rows of all my experts."""
        return self.mine_GK.count_nonzero().view(1)

    @property
    def received_before_P1(self) -> Tensor:
        """Rows that came from before each peer, and from all."""
        return self.received_before_G1.index_select(0, self.tokens.start_P1)

    def index(self, num_received: int, num_rows: int) -> tuple[Tensor, RowIndex]:
        """How many rows each of my experts got, (e,); and received rows -> rows of my experts, and back."""
        entries = Entries.of(
            torch.nonzero_static(self.mine_GK, size=num_rows)[:, 0],
            self.mine_GK,
            token_of_source=self.tokens.token_of_G,
            received_of_source=self.received_before_G1,
            num_choices=self.tokens.num_choices,
            num_tokens=self.tokens.num_tokens,
        )
        key_of_row_M, order = rows_in_order(entries)
        first_entry_R = first_entries(entries, num_received)
        return rows_per_expert(key_of_row_M, self.tokens), RowIndex(**order, first_entry_R=first_entry_R)


@dataclass(frozen=True, slots=True)
class Entries:
    """The choices that fell on my experts, in the order of their sources (tokens, or received rows), then by choice.

    Attributes:
        number_M: 0, 1, ...
        key_M: orders them by expert, then global token: ``mine * num_tokens + token``.
        told_3M: global token, received row, and which of its token's K choices each is.
    """

    number_M: Tensor
    key_M: Tensor
    told_3M: Tensor

    @property
    def received_M(self) -> Tensor:
        return self.told_3M[1]

    @classmethod
    def of(
        cls,
        flat_M: Tensor,
        mine_GK: Tensor,
        *,
        token_of_source: Tensor,
        received_of_source: Tensor,
        num_choices: int,
        num_tokens: int,
    ) -> "Entries":
        """In one pass over them.

        Args:
            flat_M: where each is in ``mine_GK``.
            mine_GK: flat, 1 + my expert of each choice of each source; larger than all for an entry of no expert.
            token_of_source, received_of_source: of each source its global token, and its received row.
            num_choices, num_tokens: K, and the tokens of the whole grid.
        """
        num_entries, num_tokens = flat_M.shape[0], max(num_tokens, 1)
        number_M, told_3M = torch.arange(num_entries, device=flat_M.device), flat_M.new_empty(3, num_entries)
        if runs_fused(flat_M, mine_GK):
            told_of_source = mine_GK, token_of_source, received_of_source
            return cls(
                number_M, launched().entries(flat_M, *told_of_source, num_choices, num_tokens, told_3M), told_3M
            )
        token_M, received_M, choice_M = told_3M.unbind(0)
        source_M = flat_M // num_choices
        torch.sub(flat_M, source_M, alpha=num_choices, out=choice_M)
        torch.index_select(token_of_source, 0, source_M, out=token_M)
        torch.index_select(received_of_source, 0, source_M, out=received_M)
        return cls(number_M, token_M.add(mine_GK.index_select(0, flat_M), alpha=num_tokens), told_3M)


def rows_in_order(entries: Entries) -> tuple[Tensor, dict[str, Tensor]]:
    """Entries -> rows: by expert, then global token, then choice. The keys of the rows, and the tensors of a
    :class:`RowIndex` but one."""
    # Entries of a source are in the order of its choices, and a stable sort leaves them so.
    key_of_row_M, entry_of_row_M = entries.key_M.sort(stable=True)
    told_3M, row_of_entry_M = reordered(entry_of_row_M, entries)
    token_of_row_M, received_of_row_M, choice_of_row_M = told_3M.unbind(0)
    return key_of_row_M, {
        "token_of_row_M": token_of_row_M,
        "received_of_row_M": received_of_row_M,
        "choice_of_row_M": choice_of_row_M,
        "row_of_entry_M": row_of_entry_M,
    }


def reordered(entry_of_row_M: Tensor, entries: Entries) -> tuple[Tensor, Tensor]:
    """``told_3M`` in the order of the rows, and the row of each entry."""
    if runs_fused(entry_of_row_M):
        return launched().reorder(entry_of_row_M, entries.told_3M)
    told_3M = entries.told_3M.gather(1, entry_of_row_M.expand(3, -1))
    return told_3M, torch.empty_like(entry_of_row_M).scatter_(0, entry_of_row_M, entries.number_M)


def rows_per_expert(key_of_row_M: Tensor, tokens: GroupTokens) -> Tensor:
    """(e,) how many of the rows with these keys, in order, belong to each of my experts."""
    return torch.searchsorted(key_of_row_M, tokens.first_key_e1).diff()


def first_entries(entries: Entries, num_received: int) -> Tensor:
    """Where the entries of each received row start. Every one has an entry, so the least is the first; ``starts``
    takes 5 times as long."""
    first_R = entries.number_M.new_full((num_received,), entries.number_M.shape[0])
    return first_R.scatter_reduce_(0, entries.received_M, entries.number_M, "amin")


def starts(key_of_entry: Tensor, num_things: int, step: int = 1) -> Tensor:
    """Where the entries of each thing start; entries are in the order of their keys, and thing i has those from
    ``i * step`` on."""
    first_keys = torch.arange(0, num_things * step, step, device=key_of_entry.device)
    return torch.searchsorted(key_of_entry, first_keys)


def inverse(permutation: Tensor) -> Tensor:
    """Where each index stands in the permutation."""
    return torch.empty_like(permutation).scatter_(
        0, permutation, torch.arange(permutation.shape[0], device=permutation.device)
    )
