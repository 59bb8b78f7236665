"""Which tokens this rank works on in each part of the model, and how they get there.

The residual stream, the norms, the projections to the latents, the router and the experts work on *my tokens*: a
rectangle of rows (over "dp") and positions (over "tp"). A tensor-parallel region, with its heads or hidden units
split over "tp", works on the *region*: the whole sequences of my data rank, the same tokens on every rank of "tp".
Letters: b rows of this data rank, l positions of this rank, L the whole sequence, u = b * L tokens of the region in
one dimension (DTensor's linear refuses an empty b beside L).
"""

from dataclasses import dataclass
from typing import Protocol, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from ..mesh import ParallelMesh
from ..partition import Partition
from ..placement import gather_tokens, place_tokens
from ..sharding import TokenSharding


class Layout(Protocol):
    """What the model asks of a layout."""

    @property
    def region_shape(self) -> tuple[int, int]:
        """(b, L)."""
        ...

    def positions(self) -> Tensor:
        """(b * l,) position of each of my tokens."""
        ...

    def region_positions(self) -> Tensor:
        """(u,) position of each token of the region."""
        ...

    def enter(self, x_blD: Tensor) -> Tensor:
        """My tokens -> the region, for a module whose input gradient each rank has a part of."""
        ...

    def local(self, x_uD: Tensor) -> Tensor:
        """A part of what entered -> the plain tensor, for work whose input gradient each rank has a part of."""
        ...

    def leave(self, x_uD: Tensor) -> Tensor:
        """Each rank's part of a sum over "tp", on the region -> the sum, on my tokens."""
        ...

    def spread(self, x_blD: Tensor) -> Tensor:
        """My tokens -> the region, for a module whose input gradient every rank has whole."""
        ...

    def run_moe(self, moe: nn.Module, x_blD: Tensor) -> tuple[Tensor, Tensor]:
        """The MoE layer on my tokens: output and scores."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OneProcess:
    """Every token here; every step the identity."""

    whole: TokenSharding

    @property
    def region_shape(self) -> tuple[int, int]:
        return self.whole.local_shape(0)

    def positions(self) -> Tensor:
        return self.whole.positions(0)

    def region_positions(self) -> Tensor:
        return self.whole.positions(0)

    def enter(self, x_blD: Tensor) -> Tensor:
        return x_blD.flatten(0, 1)

    def local(self, x_uD: Tensor) -> Tensor:
        return x_uD

    def leave(self, x_uD: Tensor) -> Tensor:
        return x_uD.unflatten(0, self.region_shape)

    def spread(self, x_blD: Tensor) -> Tensor:
        return x_blD.flatten(0, 1)

    def run_moe(self, moe: nn.Module, x_blD: Tensor) -> tuple[Tensor, Tensor]:
        return moe(x_blD)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnMesh:
    """A (dp, tp) mesh.

    Attributes:
        tokens: the tokens of all ranks.
        rank: this rank among all.
        region: the tokens of my data rank, over "tp".
        ep_tokens: the tokens of my expert-parallel group.
        dp, tp: the "dp" and "tp" meshes.
        device: where the tensors are.
    """

    tokens: TokenSharding
    rank: int
    region: TokenSharding
    ep_tokens: TokenSharding
    dp: DeviceMesh
    tp: DeviceMesh
    device: str

    @classmethod
    def of(cls, mesh: ParallelMesh, *, batch: int, seq: int) -> "OnMesh":
        """Rows balanced over "dp" and positions over "tp": uneven, and empty where there are too few."""
        dp, tp = mesh.dense["dp"], mesh.dense["tp"]
        rows, positions = Partition.balanced(batch, dp.size()), Partition.balanced(seq, tp.size())
        tokens = TokenSharding(batch=rows, seq=positions)
        return cls(
            tokens=tokens,
            rank=dist.get_rank(),
            region=TokenSharding(batch=rows.sizes[dp.get_local_rank()], seq=positions),
            ep_tokens=tokens.select(mesh.ep_ranks),
            dp=dp,
            tp=tp,
            device=mesh.dense.device_type,
        )

    @property
    def region_shape(self) -> tuple[int, int]:
        return self.region.global_shape

    def positions(self) -> Tensor:
        return self.tokens.positions(self.rank, self.device)

    def region_positions(self) -> Tensor:
        whole = TokenSharding(batch=self.region.batch, seq=self.region.seq.total)
        return whole.positions(0, self.device)

    def region_rows(self, x_BL: Tensor) -> Tensor:
        """The rows of the whole batch that my region has."""
        whole = TokenSharding(batch=self.tokens.batch, seq=self.tokens.seq.total)
        return whole.shard(x_BL, self.dp.get_local_rank())

    def all_rows(self, x_bLV: Tensor) -> Tensor:
        """Regions -> the whole batch, on every rank."""
        whole = TokenSharding(batch=self.tokens.batch, seq=self.tokens.seq.total)
        return gather_tokens(x_bLV, sharding=whole, group=self.dp.get_group())

    def enter(self, x_blD: Tensor) -> Tensor:
        x_uD = gather_tokens(x_blD, sharding=self.region, group=self.tp.get_group()).flatten(0, 1)
        # The gradient stays each rank's part: the backward of gather_tokens sums the parts.
        return DTensor.from_local(x_uD, self.tp, [Replicate()], run_check=False, grad_placements=[Partial()])

    def local(self, x_uD: Tensor) -> Tensor:
        return cast(DTensor, x_uD).to_local(grad_placements=[Partial()])

    def leave(self, x_uD: Tensor) -> Tensor:
        whole_uD = self.local(cast(DTensor, x_uD).redistribute(placements=[Replicate()]))
        return self.region.shard(whole_uD.unflatten(0, self.region_shape), self.tp.get_local_rank())

    def spread(self, x_blD: Tensor) -> Tensor:
        placed_bLD = place_tokens(x_blD, sharding=self.region, rank=self.tp.get_local_rank())
        placed_uD = DTensor.from_local(placed_bLD.flatten(0, 1), self.tp, [Partial()], run_check=False)
        return placed_uD.redistribute(placements=[Replicate()])

    def run_moe(self, moe: nn.Module, x_blD: Tensor) -> tuple[Tensor, Tensor]:
        return moe(x_blD, sharding=self.ep_tokens)
