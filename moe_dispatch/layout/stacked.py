"""The tokens of all ranks, one rank after the other, as a gather over the ranks delivers them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .on_device import ints_on
from .sharding import TokenSharding


def stacked_ranks(sharding: TokenSharding, device: torch.device | str) -> Tensor:
    """(G,) rank of every held token."""
    size_P = ints_on(sharding.local_sizes, device)
    rank_P = torch.arange(sharding.num_ranks, device=device)
    return rank_P.repeat_interleave(size_P, output_size=sharding.num_held)


def stacked_tokens(sharding: TokenSharding, device: torch.device | str) -> Tensor:
    """(G,) global token of every held token."""
    rank_of_G, ranks = stacked_ranks(sharding, device), range(sharding.num_ranks)
    row_of_P, place_of_P = zip(*map(sharding.first, ranks), strict=True)
    lengths = [max(sharding.local_shape(rank)[1], 1) for rank in ranks]
    facts_P4 = ints_on(list(zip(sharding.local_starts, lengths, row_of_P, place_of_P, strict=True)), device)
    start_G, length_G, row_G, place_G = facts_P4.index_select(0, rank_of_G).unbind(1)
    local_G = torch.arange(len(rank_of_G), device=device) - start_G
    outer_G, inner_G = local_G // length_G, local_G % length_G
    if sharding.order == "BL":
        return (row_G + outer_G) * sharding.seq.total + sharding.places.place(place_G + inner_G)
    return sharding.places.place(place_G + outer_G) * sharding.batch.total + row_G + inner_G


def rows_of_tokens(sharding: TokenSharding, starts: Sequence[int], device: torch.device | str) -> Tensor:
    """(B * L,) where each global token is, if the tokens of each rank begin at ``starts``; all tokens are held."""
    rank_T, local_T = sharding.locate(torch.arange(sharding.num_tokens, device=device))
    return ints_on(starts, device)[rank_T] + local_T
