"""The tensors of one call of attention, and what this rank knows of them before anything is sent."""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.internals import cast_to_autocast, device_of, problem_of_dtensors

from ..wire.exchange import Split, check_sharding
from ..wire.heads import GroupedHeads, heads_of_call
from ..work.scheme import Scheme, head_rank

T = TypeVar("T")
BYTES_OF_DTYPE = 2  # at least: torch adds and compares no 8-bit floats, and they do not hold the bytes of a word


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionInputs:
    """Queries, keys and values of this rank, with their shardings and heads.

    Attributes:
        q_BlNH, k_BlGH, v_BlGH: as the caller gave them, in the dtype of autocast where that is on.
        sharding, kv_sharding: of queries, and of keys and values.
        scheme: how the work is spread over the ranks.
        heads: query and key/value heads over the ranks that share the heads: all in Ulysses, else those of a team.
        problem_of_heads: what is wrong with the heads that the caller gave; empty where nothing is.
        group, rank: the sequence-parallel group, and this rank in it.
        head_rank: which of the ranks that share the heads this one is.
    """

    q_BlNH: Tensor
    k_BlGH: Tensor
    v_BlGH: Tensor
    sharding: TokenSharding
    kv_sharding: TokenSharding
    scheme: Scheme
    heads: GroupedHeads
    problem_of_heads: str
    group: dist.ProcessGroup
    rank: int
    head_rank: int

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
        scheme: Scheme,
    ) -> "AttentionInputs":
        """Check what decides how much this rank has to send: without that, no word of it could reach its peers.

        Raises:
            ValueError: dimensions, head counts, shardings, a group or a scheme that cannot be. Before any collective.
        """
        for name, x in (("q", q_BlNH), ("k", k_BlGH), ("v", v_BlGH)):
            if not isinstance(x, Tensor) or x.ndim != 4:
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{name} is {got}; it has to be (B, l, heads, width), or (l, B, heads, width)")
        if not q_BlNH.shape[3] and not k_BlGH.shape[3]:
            raise ValueError("q and k have width 0, so there are no products; each head needs a width of at least 1")
        kv_sharding = sharding if kv_sharding is None else kv_sharding
        for each in (sharding, kv_sharding):
            check_sharding(each, group)
        if kv_sharding.order != sharding.order or kv_sharding.batch.total != sharding.batch.total:
            raise ValueError(
                f"queries are {sharding}, keys and values {kv_sharding}; they may differ in the sequence only, not "
                "in the batch or the order"
            )
        num_kv, team_size = (k_BlGH.shape[2], v_BlGH.shape[2]), scheme.team_size(group.size())
        grouped, problem_of_heads = heads_of_call(q_BlNH.shape[2], num_kv, heads, team_size)
        # Before the exchange: half the bytes, and a rank without heads never comes to a product that would cast.
        q_BlNH, k_BlGH, v_BlGH = (cast_to_autocast(x) for x in (q_BlNH, k_BlGH, v_BlGH))
        return cls(
            q_BlNH=q_BlNH,
            k_BlGH=k_BlGH,
            v_BlGH=v_BlGH,
            sharding=sharding,
            kv_sharding=kv_sharding,
            scheme=scheme,
            heads=grouped,
            problem_of_heads=problem_of_heads,
            group=group,
            rank=group.rank(),
            head_rank=head_rank(group.rank(), team_size),
        )

    @property
    def lengths(self) -> tuple[int, int]:
        """(L, L_kv)."""
        return self.sharding.seq.total, self.kv_sharding.seq.total

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """What q, k and v have to be on this rank, given the shardings, the head counts and the widths of q and v."""
        width = self.q_BlNH.shape[3] or self.k_BlGH.shape[3]
        kv_local = self.kv_sharding.local_shape(self.rank)
        q_shape = (*self.sharding.local_shape(self.rank), self.heads.query.total, width)
        k_shape = (*kv_local, self.heads.num_kv, width)
        return q_shape, k_shape, (*kv_local, self.heads.num_kv, self.v_BlGH.shape[3])

    @property
    def first_head(self) -> int:
        """The global number of this rank's first query head."""
        return self.heads.query.offsets[self.head_rank]

    @property
    def num_heads(self) -> int:
        """How many query heads this rank attends with."""
        return self.heads.query.sizes[self.head_rank]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_BlNH, self.k_BlGH, self.v_BlGH

    @property
    def device(self) -> torch.device:
        """Where this rank's words are made: see :func:`device_of_words`."""
        return device_of_words(self.tensors, self.group)

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        """Of q, k and v over the ranks; k and v by the heads that each rank needs."""
        kv = Split(sharding=self.kv_sharding, heads=self.heads.kv_sent)
        return Split(sharding=self.sharding, heads=self.heads.query), kv, kv

    @property
    def facts(self) -> str:
        """What all ranks have to agree on, as text."""
        q_shape, _, v_shape = self.shapes
        return (
            f"{self.q_BlNH.dtype}, widths {constants((q_shape[3], v_shape[3]))}, query heads "
            f"{constants(self.heads.query.sizes)}, {index(self.heads.num_kv)} key/value heads, "
            f"{index(self.sharding.batch.total)} rows of {told(self.sharding)}, keys {told(self.kv_sharding)}"
        )

    @property
    def problem(self) -> str:
        """What is wrong with this rank's heads and tensors; empty where nothing is."""
        if problem := problem_of_dtensors(q=self.q_BlNH, k=self.k_BlGH, v=self.v_BlGH):
            return problem
        num_key, num_value = self.k_BlGH.shape[2], self.v_BlGH.shape[2]
        if num_key != num_value and all(num and not self.heads.query.total % num for num in (num_key, num_value)):
            return f"k has {num_key} heads and v {num_value}; each key/value head has a key and a value: pass as many"
        if self.problem_of_heads:
            return self.problem_of_heads
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
        if self.q_BlNH.itemsize < BYTES_OF_DTYPE:
            return f"q, k, v are {self.q_BlNH.dtype}; cast them to a floating-point dtype of at least 16 bits"
        if len({x.device for x in self.tensors}) > 1:
            return f"q, k, v are on {', '.join(str(x.device) for x in self.tensors)}; move them to one device"
        if self.q_BlNH.is_meta:
            return "q, k, v are on meta, where there are no values to send; give them memory, e.g. module.to_empty()"
        return ""

    def stand_ins(self) -> tuple[Tensor, ...]:
        """Zeros that a rank with a problem sends instead: of the shapes that its peers expect, and of the dtype that
        most of q, k, v have."""
        dtype = most([x.dtype for x in self.tensors])
        return tuple(torch.zeros(shape, dtype=dtype, device=self.device) for shape in self.shapes)


def device_of_words(tensors: Iterable[Any], group: dist.ProcessGroup) -> torch.device:
    """The device of most of these, as far as they are tensors with values. Words have to reach the peers in any case:
    else one on which the group communicates."""
    devices = [x.device for x in tensors if isinstance(x, Tensor) and not x.is_meta]
    return most(devices) if devices else device_of(group)


def most(values: list[T]) -> T:
    """The value that most are; the first of them where several are as many."""
    return max(values, key=values.count)


def told(sharding: TokenSharding) -> str:
    """Which tokens each rank holds."""
    return (
        f"{constants(sharding.seq.sizes)} tokens, order {sharding.order}, pieces {sharding.places.text}, shards "
        f"{constants(sharding.rectangles)}"
    )


def constants(sizes: Iterable[int]) -> tuple[int, ...]:
    """Sizes as numbers: while torch.compile traces they may be symbols, which have no digest. ``index`` makes each a
    constant of the graph, so that other sizes are another graph."""
    return tuple([index(size) for size in sizes])
