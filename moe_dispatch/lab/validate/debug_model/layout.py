"""Which tokens this rank works on in each part of the model, and how they get there.

The residual stream, the norms, the projections to the latents, the router and the experts work on *my tokens*: a
rectangle of rows (over "dp") and positions (over "sp" in any order of tokens, then "tp"). A tensor-parallel region,
with its heads or hidden units split over "tp", works on the *region*: the positions of my sequence rank, the same
tokens on every rank of "tp". Attention needs whole sequences: it trades the region's tokens for heads over "sp".
Letters: b rows of this data rank, l positions of this rank, m positions of its region, u = b * m tokens of the region
in one dimension (DTensor's linear refuses an empty b beside m).
"""

from dataclasses import dataclass
from typing import Protocol, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from sp_attention import Batch, ShardedBatch, shard_batch, shift_labels

from .... import ParallelMesh, Partition, TokenSharding, gather_tokens, place_tokens
from ....internals import check_is_group
from ..config.spreading import Spreading
from .attention import Attention, SpreadAttention, WholeAttention
from .packing import Packing


class Layout(Protocol):
    """What the model asks of a layout."""

    @property
    def region_shape(self) -> tuple[int, int]:
        """(b, m)."""
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

    def mine(self, x_uV: Tensor) -> Tensor:
        """The region -> my tokens, (b, l, V): each rank of "tp" goes on with its own."""
        ...

    @property
    def attention(self) -> Attention:
        """To whole sequences, of the region's tokens."""
        ...

    def run_moe(self, moe: nn.Module, x_blD: Tensor) -> tuple[Tensor, Tensor]:
        """The MoE layer on my tokens: output and scores."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OneProcess:
    """Every token here; every step the identity.

    Attributes:
        whole: the tokens.
        packing: where the documents lie.
    """

    whole: TokenSharding
    packing: Packing

    @property
    def region_shape(self) -> tuple[int, int]:
        return self.whole.local_shape(0)

    def positions(self) -> Tensor:
        return self.packing.position_of_place_L[self.whole.positions(0)]

    def region_positions(self) -> Tensor:
        return self.positions()

    def enter(self, x_blD: Tensor) -> Tensor:
        return x_blD.flatten(0, 1)

    def local(self, x_uD: Tensor) -> Tensor:
        return x_uD

    def leave(self, x_uD: Tensor) -> Tensor:
        return x_uD.unflatten(0, self.region_shape)

    def spread(self, x_blD: Tensor) -> Tensor:
        return x_blD.flatten(0, 1)

    def mine(self, x_uV: Tensor) -> Tensor:
        return x_uV.unflatten(0, self.region_shape)

    @property
    def attention(self) -> Attention:
        return WholeAttention(packing=self.packing)

    def run_moe(self, moe: nn.Module, x_blD: Tensor) -> tuple[Tensor, Tensor]:
        return moe(x_blD)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnMesh:
    """A (dp, sp, tp) mesh.

    Attributes:
        tokens: the tokens of all ranks.
        rank: this rank among all.
        row_tokens: the tokens of my data rank, over "sp" x "tp".
        row: those ranks.
        regions: the tokens of my data rank, over "sp".
        region: those of my sequence rank, over "tp".
        ep_tokens: the tokens of my expert-parallel group.
        packing: where the documents lie.
        spreading: of attention over "sp".
        dense: the mesh.
    """

    tokens: TokenSharding
    rank: int
    row_tokens: TokenSharding
    row: DeviceMesh
    regions: TokenSharding
    region: TokenSharding
    ep_tokens: TokenSharding
    packing: Packing
    spreading: Spreading
    dense: DeviceMesh

    @classmethod
    def of(cls, mesh: ParallelMesh, *, whole_rows: TokenSharding, packing: Packing, spreading: Spreading) -> "OnMesh":
        """Rows balanced over "dp"; the places of ``whole_rows`` over "sp", and those of each rank balanced over "tp":
        uneven, and empty where there are too few."""
        device = mesh.dense.device_type
        dp, sp, tp = (mesh.dense[name] for name in ("dp", "sp", "tp"))
        rows = Partition.balanced(whole_rows.batch.total, dp.size())
        places = whole_rows.cut(tp.size())
        tokens = places.with_batch(rows)
        mine = rows.sizes[dp.get_local_rank()]
        _, length = whole_rows.extent(sp.get_local_rank())
        return cls(
            tokens=tokens,
            rank=dist.get_rank(),
            row_tokens=places.with_batch(mine),
            row=mesh.dense["sp", "tp"]._flatten("row"),
            regions=whole_rows.with_batch(mine),
            region=TokenSharding(batch=mine, seq=Partition.balanced(length, tp.size())),
            ep_tokens=tokens.select(mesh.ep_ranks),
            packing=packing.to(device),
            spreading=spreading,
            dense=mesh.dense,
        )

    @property
    def tp(self) -> DeviceMesh:
        return self.dense["tp"]

    @property
    def region_shape(self) -> tuple[int, int]:
        return self.region.global_shape

    def positions(self) -> Tensor:
        return self.packing.position_of_place_L[self.tokens.positions(self.rank, self.dense.device_type)]

    def region_positions(self) -> Tensor:
        sp_rank = self.dense["sp"].get_local_rank()
        return self.packing.position_of_place_L[self.regions.positions(sp_rank, self.dense.device_type)]

    def my_batch(self, token_BL: Tensor) -> ShardedBatch:
        """My part of the whole batch: its rows over "dp", then tokens and targets over "sp" x "tp"."""
        rows = TokenSharding(batch=self.tokens.batch, seq=self.tokens.seq.total)
        token_bL = rows.shard(token_BL, self.dense["dp"].get_local_rank())
        target_bL = shift_labels(token_bL, **self.packing.documents)
        batch = Batch(token_BL=token_bL, target_BL=target_bL, **self.packing.documents)
        return shard_batch(batch, sharding=self.row_tokens, group=self.row.get_group())

    def enter(self, x_blD: Tensor) -> Tensor:
        x_uD = gather_tokens(x_blD, sharding=self.region, group=self.tp.get_group()).flatten(0, 1)
        # The gradient stays each rank's part: the backward of gather_tokens sums the parts.
        return DTensor.from_local(x_uD, self.tp, [Replicate()], run_check=False, grad_placements=[Partial()])

    def local(self, x_uD: Tensor) -> Tensor:
        return cast(DTensor, x_uD).to_local(grad_placements=[Partial()])

    def leave(self, x_uD: Tensor) -> Tensor:
        return self.mine(cast(DTensor, x_uD).redistribute(placements=[Replicate()]))

    def spread(self, x_blD: Tensor) -> Tensor:
        placed_bmD = place_tokens(x_blD, sharding=self.region, rank=self.tp.get_local_rank())
        placed_uD = DTensor.from_local(placed_bmD.flatten(0, 1), self.tp, [Partial()], run_check=False)
        return placed_uD.redistribute(placements=[Replicate()])

    def mine(self, x_uV: Tensor) -> Tensor:
        return self.region.shard(self.local(x_uV).unflatten(0, self.region_shape), self.tp.get_local_rank())

    @property
    def attention(self) -> Attention:
        return SpreadAttention(
            regions=self.regions,
            sp=self.dense.get_group("sp"),
            packing=self.packing,
            spreading=self.spreading,
        )

    def run_moe(self, moe: nn.Module, x_blD: Tensor) -> tuple[Tensor, Tensor]:
        return moe(x_blD, sharding=self.ep_tokens)


def everyone() -> dist.ProcessGroup:
    """The default process group."""
    return check_is_group(dist.group.WORLD)
