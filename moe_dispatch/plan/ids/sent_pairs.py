"""The pairs of a peer and one of my tokens, of which each is a row to send or none."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...layout.on_device import ints_on
from ...layout.sharding import TokenSharding


@dataclass(frozen=True, slots=True, eq=False)
class SentPairs:
    """Of one rank, whose tokens are t. Pairs (N) are in the order of peers (:class:`GroupTokens`), then of tokens.

    Attributes:
        token_and_key_2N: the token of each, and a key that orders pairs by token and then by rank.
        first_key_t: the least such key of each token.
    """

    token_and_key_2N: Tensor
    first_key_t: Tensor

    @classmethod
    def of(cls, sharding: TokenSharding, rank: int, device: torch.device) -> "SentPairs":
        """Made once, and kept by the sharding."""
        return sharding.keep((cls, rank, device), lambda: cls._made(sharding, rank, device))

    @classmethod
    @torch.inference_mode(False)  # it outlives the call
    def _made(cls, sharding: TokenSharding, rank: int, device: torch.device) -> "SentPairs":
        ranks = sharding.num_ranks
        rank_of_peer_P = ints_on([*(r for r in range(ranks) if r != rank), rank], device)
        token_t = torch.arange(sharding.local_sizes[rank], device=device)
        key_Pt = rank_of_peer_P.unsqueeze(1) + token_t * ranks
        return cls(torch.stack([token_t.expand_as(key_Pt).flatten(), key_Pt.flatten()]), token_t * ranks)
