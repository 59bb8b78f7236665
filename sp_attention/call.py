"""One call of the attention: its tensors, and what is known of them before anything moves."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding

from .exchange import Lane, check_lane
from .heads import GroupedHeads


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """Queries, keys and values of this rank with their shardings.

    Attributes:
        q_BlNH, k_BlGH, v_BlGH: as the caller gave them.
        sharding, kv_sharding: of queries, and of keys and values.
        heads: query and key/value heads over ranks.
        group, rank: the sequence-parallel group, and this rank in it.
    """

    q_BlNH: Tensor
    k_BlGH: Tensor
    v_BlGH: Tensor
    sharding: TokenSharding
    kv_sharding: TokenSharding
    heads: GroupedHeads
    group: dist.ProcessGroup
    rank: int

    @classmethod
    def of(
        cls,
        q_BlNH: Tensor,
        k_BlGH: Tensor,
        v_BlGH: Tensor,
        sharding: TokenSharding,
        kv_sharding: TokenSharding | None,
        heads: Partition | None,
        group: dist.ProcessGroup,
    ) -> "Call":
        """Check what every rank can see.

        Raises:
            ValueError: shapes, head counts, shardings or a group that cannot be. Before any collective.
        """
        for name, x in (("q", q_BlNH), ("k", k_BlGH), ("v", v_BlGH)):
            if x.ndim != 4:
                raise ValueError(
                    f"{name} is {tuple(x.shape)}; it has to be (B, l, heads, width), or (l, B, heads, width)"
                )
        num_query, num_kv = q_BlNH.shape[2], k_BlGH.shape[2]
        if num_kv < 1 or num_query % num_kv:
            raise ValueError(
                f"{num_query} query heads over {num_kv} key/value heads; each key/value head serves the same number "
                "of query heads, so their number has to divide that of the query heads"
            )
        kv_sharding = kv_sharding or sharding
        heads = heads or Partition.balanced(num_query, sharding.num_ranks)
        for lane_sharding in (sharding, kv_sharding):
            check_lane(lane_sharding, heads, group)
        if kv_sharding.order != sharding.order or kv_sharding.batch.total != sharding.batch.total:
            raise ValueError(
                f"queries are {sharding}, keys and values {kv_sharding}; they may differ in the sequence only, not "
                "in the batch or the order"
            )
        return cls(
            q_BlNH=q_BlNH,
            k_BlGH=k_BlGH,
            v_BlGH=v_BlGH,
            sharding=sharding,
            kv_sharding=kv_sharding,
            heads=GroupedHeads(heads, num_kv),
            group=group,
            rank=group.rank(),
        )

    @property
    def lengths(self) -> tuple[int, int]:
        """(L, L_kv)."""
        return self.sharding.seq.total, self.kv_sharding.seq.total

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """What q, k and v have to be on this rank, given the shardings, the head counts and the widths of q and v."""
        q_shape = (*self.sharding.local_shape(self.rank), self.heads.query.total, self.q_BlNH.shape[3])
        kv_local = self.kv_sharding.local_shape(self.rank)
        k_shape = (*kv_local, self.heads.num_kv, self.q_BlNH.shape[3])
        return q_shape, k_shape, (*kv_local, self.heads.num_kv, self.v_BlGH.shape[3])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_BlNH, self.k_BlGH, self.v_BlGH

    @property
    def lanes(self) -> tuple[Lane, Lane, Lane]:
        """How q, k and v travel, k and v by the heads that each rank needs."""
        kv = Lane(sharding=self.kv_sharding, heads=self.heads.kv_sent)
        return Lane(sharding=self.sharding, heads=self.heads.query), kv, kv

    @property
    def facts(self) -> str:
        """What the ranks have to agree about."""
        widths = self.q_BlNH.shape[3], self.v_BlGH.shape[3]
        return (
            f"{self.q_BlNH.dtype}, widths {widths}, query heads {self.heads.query.sizes}, {self.heads.num_kv} "
            f"key/value heads, {self.sharding.batch.total} rows of {self.sharding.seq.sizes} tokens, order "
            f"{self.sharding.order}, shards {self.sharding.rectangles}, keys {self.kv_sharding.seq.sizes}"
        )

    @property
    def problem(self) -> str:
        """What is wrong with this rank's tensors; empty where nothing is."""
        for name, x, shape in zip("qkv", self.tensors, self.shapes, strict=True):
            if tuple(x.shape) != shape:
                return (
                    f"{name} is {tuple(x.shape)}, but this rank's shard in order {self.sharding.order!r} is "
                    f"{shape}; pass the tokens that the sharding gives this rank, with all heads of the partition"
                )
        dtypes = {x.dtype for x in self.tensors}
        if len(dtypes) > 1 or not self.q_BlNH.is_floating_point():
            return (
                f"q, k, v are {', '.join(str(x.dtype) for x in self.tensors)}; cast them to one floating-point dtype"
            )
        if len({x.device for x in self.tensors}) > 1:
            return f"q, k, v are on {', '.join(str(x.device) for x in self.tensors)}; move them to one device"
        return ""

    def stand_ins(self) -> tuple[Tensor, ...]:
        """Zeros of the shapes, and the dtype of most of q, k, v, that the peers expect of a rank with a problem."""
        dtypes = [x.dtype for x in self.tensors]
        dtype = max(dtypes, key=dtypes.count)
        return tuple(torch.zeros(shape, dtype=dtype, device=self.q_BlNH.device) for shape in self.shapes)
