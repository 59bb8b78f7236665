"""A batch cut over all ranks of a mesh: rows over "dp", the sequence over "sp", and then over "tp"."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moe_dispatch import ParallelMesh, Partition, TokenSharding

from ..batch.batch import Batch, ShardedBatch
from ..batch.checks import check_devices, check_types, device_of
from ..batch.shard import CompletedBatch, agreed_by_ranks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeshBatch:
    """This rank's part of a batch, and what each kind of layer has to know of the rest.

    Attributes:
        batch: this rank's (b, l) tokens, targets, positions, padding and fields.
        sharding: the (B, L) grid over all ranks of the mesh.
        attention: keyword arguments of :func:`ulysses_attention` over the "sp" group.
        moe: keyword arguments of :class:`moe_dispatch.MoE` over the "ep" group.
        region: the tokens of this rank's "sp" rank over its "tp" ranks: what ``gather_tokens`` and ``place_tokens``
            of the "tp" group need around a tensor-parallel region. Without "tp", this rank's own.
    """

    batch: ShardedBatch
    sharding: TokenSharding
    attention: Mapping[str, Any]
    moe: Mapping[str, Any]
    region: TokenSharding


def shard_over_mesh(
    batch: Batch,
    mesh: ParallelMesh,
    lengths: Sequence[int] | None,
    sharding: TokenSharding | None,
    group: dist.ProcessGroup,
) -> MeshBatch:
    """See :meth:`Parallel.shard`."""
    return agreed_by_ranks(
        lambda: facts_and_part(batch, mesh, lengths, sharding, group), device_of(batch, group), group
    )


def facts_and_part(
    batch: Batch,
    mesh: ParallelMesh,
    lengths: Sequence[int] | None,
    sharding: TokenSharding | None,
    group: dist.ProcessGroup,
) -> tuple[str, MeshBatch]:
    """What all ranks have to agree about, and what of it is this rank's; ValueError for what is wrong."""
    check_types(batch)
    check_devices(batch, group)
    if batch.token_BL.ndim != 2:
        raise ValueError(f"token_BL is {tuple(batch.token_BL.shape)}; it has to be (B, L)")
    rows, length = batch.token_BL.shape
    regions = _regions(rows, length, mesh, lengths, sharding)
    completed = CompletedBatch.of(batch, TokenSharding(batch=rows, seq=length))
    part = _part(batch, mesh, regions)
    return completed.facts(batch, part.sharding), part


def _regions(
    rows: int, length: int, mesh: ParallelMesh, lengths: Sequence[int] | None, sharding: TokenSharding | None
) -> TokenSharding:
    """The places of each rank of "sp"."""
    sp = mesh.dense["sp"].size()
    if sharding is not None:
        _check(sharding, (rows, length), lengths, sp)
        return sharding
    regions = Partition.balanced(length, sp) if lengths is None else Partition(tuple(lengths))
    if (len(regions), regions.total) != (sp, length):
        raise ValueError(
            f"lengths {regions.sizes} for a sequence of {length} over sp = {sp}; give each rank of sp a length, 0 "
            "too, which add up to that"
        )
    return TokenSharding(batch=rows, seq=regions)


def _check(sharding: TokenSharding, grid: tuple[int, int], lengths: Sequence[int] | None, sp: int) -> None:
    if lengths is not None:
        raise ValueError(
            "lengths and a sharding; the sharding says how many places each rank of sp holds: leave lengths out"
        )
    if not isinstance(sharding, TokenSharding):
        raise ValueError(
            f"sharding is {sharding!r}; pass the TokenSharding that says which places each rank of sp holds"
        )
    if (sharding.global_shape, len(sharding.batch), sharding.num_ranks) != (grid, 1, sp):
        raise ValueError(
            f"a sharding of {sharding.global_shape} in order {sharding.order!r} over {sharding.num_ranks} ranks, for "
            f"a batch of (B, L) = {grid} over sp = {sp}; give whole rows over the ranks of sp, in order 'BL', e.g. "
            f"TokenSharding.zigzag(batch={grid[0]}, length={grid[1]}, ranks={sp})"
        )
    sharding.check_whole("Parallel.shard")


def _part(batch: Batch, mesh: ParallelMesh, regions: TokenSharding) -> MeshBatch:
    dp, _, tp = mesh.dense.shape
    dp_rank, sp_rank, tp_rank = (mesh.dense.get_local_rank(name) for name in ("dp", "sp", "tp"))
    over_dp, places = Partition.balanced(regions.batch.total, dp), regions.cut(tp) if tp > 1 else regions
    grid, rows = places.with_batch(over_dp), places.with_batch(over_dp.sizes[dp_rank])
    mine = _rows(batch, over_dp.offsets[dp_rank], over_dp.sizes[dp_rank])
    sharded = CompletedBatch.of(mine, rows).part(mine, rows, sp_rank * tp + tp_rank)
    return MeshBatch(
        batch=sharded,
        sharding=grid,
        attention={**sharded.attention, "sharding": regions.with_batch(rows.batch)},
        moe={"sharding": grid.select(mesh.ep_ranks), "real_Bl": sharded.real_Bl},
        region=TokenSharding(batch=rows.batch, seq=Partition.balanced(regions.extent(sp_rank)[1], tp)),
    )


def _rows(batch: Batch, first: int, size: int) -> Batch:
    """The rows of one "dp" rank."""

    def of(x_BL: Tensor | None, dim: int = 0) -> Tensor | None:
        return None if x_BL is None else x_BL.narrow(dim, first, size)

    mask, position_BL = batch.attention_mask, batch.position_BL
    is_for_all = mask is not None and mask.ndim == 4 and len(mask) == 1
    return replace(
        batch,
        token_BL=batch.token_BL.narrow(0, first, size),
        target_BL=of(batch.target_BL),
        loss_mask_BL=of(batch.loss_mask_BL),
        position_BL=None if position_BL is None else of(position_BL, position_BL.ndim - 2),
        attention_mask=mask if is_for_all else of(mask),
        fields={name: x_BL.narrow(0, first, size) for name, x_BL in batch.fields.items()},
    )
