"""Which tokens the rows are that a Transformers model gives to a layer."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...layout.sharding import TokenSharding
from ...wire.token_counts import gather_sharding

IMPLEMENTATION = "moe_dispatch_implementation"  # the attribute of experts that Transformers sharded: what serves them


@dataclass(frozen=True, slots=True, eq=False)
class FedTokens:
    """The tokens of one call of a layer.

    Attributes:
        sharding: those of all ranks that run the layer together.
        rank: this one.
        fed_shape: (rows, length) that the model got: (b, l), or with a dummy token where the rank has none.
    """

    sharding: TokenSharding
    rank: int
    fed_shape: tuple[int, int]

    def own(self, x_T: Tensor) -> Tensor:
        """(T, ...) of all tokens that the model got -> (b, l, ...) without the dummy."""
        rows, length = self.sharding.local_shape(self.rank)
        return x_T.unflatten(0, self.fed_shape)[:rows, :length]

    def feed(self, x_BlD: Tensor, dummy: int = 0) -> Tensor:
        """(b, l, D) -> (T, D), with a dummy where there is one."""
        rows, length = x_BlD.shape[:2]
        padding = (0, 0, 0, self.fed_shape[1] - length, 0, self.fed_shape[0] - rows)
        return nn.functional.pad(x_BlD, padding, value=dummy).flatten(0, 1)


def told_by_ranks(num_rows: int, *, device: torch.device, group: dist.ProcessGroup) -> FedTokens:
    """Each rank knows its number only; all of them are tokens. One exchange, one host sync."""
    sharding, rank = gather_sharding(num_rows, device=device, group=group), group.rank()
    return FedTokens(sharding, rank, sharding.local_shape(rank))
