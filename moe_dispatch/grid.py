"""What a plan knows before any routing has come: index tensors that depend on the sharding only.

Made while the routing exchange is under way. Kept by nobody: they are a tenth of a plan's work, and a cache would be
state of the process.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .partition import Partition
from .sharding import TokenSharding


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The tokens of a group, rank after rank (G), as the routing exchange delivers them.

    Attributes:
        status_P: step of each rank's status word, among the steps of all messages.
        step_GS: the steps that hold each token's ids.
        token_of_G: global token.
        start_P1: where each rank's tokens start, and the end of all.
        first_expert_P: the first expert of each rank.
    """

    status_P: Tensor
    step_GS: Tensor
    token_of_G: Tensor
    start_P1: Tensor
    first_expert_P: Tensor

    @classmethod
    def of(cls, sharding: TokenSharding, experts: Partition, steps: int, device: torch.device) -> "Grid":
        """``steps``: of 4 bytes, that each token's ids take."""
        rank_of_G = sharding.stacked_ranks(device)
        starts = sharding.local_starts
        first_step_G = torch.arange(len(rank_of_G), device=device) * steps + rank_of_G + 1
        return cls(
            status_P=torch.tensor([start * steps + rank for rank, start in enumerate(starts)], device=device),
            step_GS=first_step_G.unsqueeze(1) + torch.arange(steps, device=device),
            token_of_G=sharding.stacked_tokens(device),
            start_P1=torch.tensor((*starts, len(rank_of_G)), device=device),
            first_expert_P=torch.tensor(experts.offsets, device=device),
        )
