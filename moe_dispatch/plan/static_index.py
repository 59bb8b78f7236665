"""From the ids of a group to the index tensors of one rank's plan of fixed sizes.

Rows travel in *slots*: ``rows_per_pair`` of them from each rank to each, in the order of the peers, filled from the
first on, in the order of the tokens. What does not fit is left out, here and on the other side alike.

``torch.where`` with a number is avoided: it copies the number to the device, which a graph cannot capture.
"""

import torch
from torch import Tensor

from .ids.group_tokens import GroupTokens
from .row_index import Entries, RowIndex, SentRows, rows_in_order, rows_per_expert, starts

# Unused entries are summed up as bags of their own, which are cut off: of few entries each, since a GPU adds up the
# entries of a bag one after the other.
UNUSED_PER_BAG = 32


def index_sent(sent_rows: SentRows, in_pair: int) -> dict[str, Tensor]:
    """My tokens -> sent slots, and back. An unused slot carries token 0.

    Args:
        in_pair: slots from each rank to each.
    """
    needed_Pt = sent_rows.needed_Pt
    ranks, num_tokens = needed_Pt.shape
    num_sent = ranks * in_pair
    number_Pt = needed_Pt.cumsum(1) - 1
    first_P1 = torch.arange(0, num_sent, in_pair, device=needed_Pt.device).unsqueeze(1)
    # One slot more, for all that has none.
    slot_Pt = (first_P1 + number_Pt).masked_fill_(~needed_Pt | (number_Pt >= in_pair), num_sent)
    token_Pt = torch.arange(num_tokens, device=needed_Pt.device).expand(ranks, num_tokens)
    token_of_slot_S1 = first_P1.new_full((num_sent + 1,), num_tokens)
    token_of_sent_S = token_of_slot_S1.scatter_(0, slot_Pt.flatten(), token_Pt.flatten())[:-1]
    rank_of_sent_S = sent_rows.tokens.rank_of_peer_P.repeat_interleave(in_pair, output_size=num_sent)
    key_of_entry_S, sent_of_entry_S = rank_of_sent_S.add(token_of_sent_S, alpha=ranks).sort(stable=True)
    return {
        "token_of_sent_S": token_of_sent_S.masked_fill(token_of_sent_S == num_tokens, 0),
        "sent_of_entry_S": sent_of_entry_S,
        "first_entry_t": _starts_and_rest(key_of_entry_S, num_tokens, step=ranks),
    }


def index_received(mine_GK: Tensor, tokens: GroupTokens, in_pair: int, num_rows: int) -> tuple[Tensor, RowIndex]:
    """How many rows each of my experts got, (e,); and received slots -> rows of my experts, and back.

    Args:
        mine_GK: flat, 1 + my expert of each choice; 0 for the choices that fell elsewhere.
        in_pair: slots from each rank to each.
        num_rows: of my experts, used or not.
    """
    num_received, num_choices = len(tokens.rank_of_peer) * in_pair, tokens.num_choices
    after_mine = len(tokens.first_key_e1) + 1
    slot_G = _received_slots(mine_GK.view(-1, num_choices).any(1), tokens, in_pair)
    fits_GK = (slot_G < num_received).repeat_interleave(num_choices)
    # One token more, behind the last: of the entries that are not used. It comes after all in the order of the rows.
    chosen_GK = mine_GK * fits_GK
    if not len(chosen_GK):  # CUDA's nonzero_static divides by the number of values
        chosen_GK = chosen_GK.new_zeros(1)
    flat_of_entry_M = torch.nonzero_static(chosen_GK, size=num_rows, fill_value=len(mine_GK))[:, 0]
    entries = Entries.of(
        flat_of_entry_M,
        _with_last(mine_GK, after_mine),
        token_of_source=_with_last(tokens.token_of_G, -1),
        received_of_source=_with_last(slot_G, num_received),
        num_choices=num_choices,
        num_tokens=tokens.num_tokens,
    )
    key_of_row_M, order = rows_in_order(entries)
    first_entry_R = _starts_and_rest(entries.received_M, num_received)
    return rows_per_expert(key_of_row_M, tokens), RowIndex(**order, first_entry_R=first_entry_R)


def needed_sizes(id_GK: Tensor, tokens: GroupTokens) -> Tensor:
    """(2,) the most rows that any rank has for any rank, and the most rows that any rank's experts get."""
    ranks = len(tokens.rank_of_peer)
    to_GK = tokens.peer_of_id.take(id_GK)
    ones_GK = torch.ones_like(to_GK)
    rows_P = to_GK.new_zeros(ranks + 1).scatter_add_(0, to_GK.flatten(), ones_GK.flatten())[1:]
    sorted_GK = to_GK.sort(1).values
    again_GK = torch.zeros_like(sorted_GK, dtype=torch.bool)
    again_GK[:, 1:] = sorted_GK[:, 1:] == sorted_GK[:, :-1]
    pair_GK = tokens.peer_of_G.unsqueeze(1) * (ranks + 1) + sorted_GK.masked_fill(again_GK, 0)
    pairs_PP = to_GK.new_zeros(ranks * (ranks + 1)).scatter_add_(0, pair_GK.flatten(), ones_GK.flatten())
    return torch.stack([pairs_PP.view(ranks, ranks + 1)[:, 1:].max(), rows_P.max()])


def _received_slots(here_G: Tensor, tokens: GroupTokens, in_pair: int) -> Tensor:
    """The slot in which each token comes; the one behind the last for tokens that do not."""
    before_G1 = torch.zeros(len(here_G) + 1, dtype=torch.int64, device=here_G.device)
    torch.cumsum(here_G, 0, out=before_G1[1:])
    first_P = before_G1.index_select(0, tokens.start_P1[:-1])
    number_G = before_G1[:-1] - first_P.index_select(0, tokens.peer_of_G)
    slot_G = tokens.peer_of_G * in_pair + number_G
    return slot_G.masked_fill_(~here_G | (number_G >= in_pair), len(tokens.rank_of_peer) * in_pair)


def _starts_and_rest(key_of_entry: Tensor, num_things: int, step: int = 1) -> Tensor:
    """:func:`starts`, and then bags of the entries that belong to none, whose keys are the largest."""
    num_entries = len(key_of_entry)
    start = starts(key_of_entry, num_things + 1, step)
    bag_1 = torch.arange(1, -(-num_entries // UNUSED_PER_BAG), device=start.device)
    return torch.cat([start, (start[-1] + bag_1 * UNUSED_PER_BAG).clamp_(max=num_entries)])


def _with_last(values: Tensor, last: int) -> Tensor:
    return torch.cat([values, values.new_full((1,), last)])
