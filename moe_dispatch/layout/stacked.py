"""The tokens of all ranks, one rank after the other, as a gather over the ranks delivers them."""

import torch
from torch import Tensor

from .sharding import TokenSharding


def stacked_ranks(sharding: TokenSharding, device: torch.device | str) -> Tensor:
    """(G,) rank of every held token."""
    size_P = torch.tensor(sharding.local_sizes, dtype=torch.int64, device=device)
    rank_P = torch.arange(sharding.num_ranks, device=device)
    return rank_P.repeat_interleave(size_P, output_size=sharding.num_held)


def stacked_tokens(sharding: TokenSharding, device: torch.device | str) -> Tensor:
    """(G,) global token of every held token."""
    rank_of_G, ranks = stacked_ranks(sharding, device), range(sharding.num_ranks)
    outer_of_P, inner_of_P = zip(*map(sharding.corner, ranks), strict=True)
    if sharding.order == "LB":
        outer_of_P, inner_of_P = inner_of_P, outer_of_P
    lengths = [max(sharding.local_shape(rank)[1], 1) for rank in ranks]
    facts_P4 = torch.tensor(
        list(zip(sharding.local_starts, lengths, outer_of_P, inner_of_P, strict=True)), device=device
    )
    start_G, length_G, outer_G, inner_G = facts_P4.index_select(0, rank_of_G).unbind(1)
    local_G = torch.arange(len(rank_of_G), device=device) - start_G
    return (outer_G + local_G // length_G) * sharding.global_shape[1] + inner_G + local_G % length_G
