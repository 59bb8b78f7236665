"""What any call of attention knows before anything is sent, whatever travels for keys and values."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import index

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import TokenSharding
from moe_dispatch.internals import carries, device_for

from ..spread.source import Source
from ..wire.exchange import check_sharding
from ..wire.heads import GroupedHeads
from ..work.scheme import Scheme

BYTES_OF_DTYPE = 2  # at least: torch adds and compares no 8-bit floats, and they do not hold the bytes of a word


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs(ABC):
    """What any call knows of its tensors, whatever travels for keys and values.

    Attributes:
        q_BlNH: as the caller gave it, in the dtype of autocast where that is on.
        sharding, kv_sharding: of queries, and of keys and values.
        scheme: how the work is spread over the ranks.
        heads: query and key/value heads over the ranks that share the heads: all in Ulysses, else those of a team.
        problem_of_heads: what is wrong with the heads that the caller gave; empty where nothing is.
        group, rank: the sequence-parallel group, and this rank in it.
        head_rank: which of the ranks that share the heads this one is.
    """

    q_BlNH: Tensor
    sharding: TokenSharding
    kv_sharding: TokenSharding
    scheme: Scheme
    heads: GroupedHeads
    problem_of_heads: str
    group: dist.ProcessGroup
    rank: int
    head_rank: int

    @property
    def lengths(self) -> tuple[int, int]:
        """(L, L_kv)."""
        return self.sharding.seq.total, self.kv_sharding.seq.total

    @property
    def first_head(self) -> int:
        """The global number of this rank's first query head."""
        return self.heads.query.offsets[self.head_rank]

    @property
    def num_heads(self) -> int:
        """How many query heads this rank attends with."""
        return self.heads.query.sizes[self.head_rank]

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Queries, and what travels for keys: (B, l, heads, width), or (l, B, heads, width)."""

    @property
    @abstractmethod
    def weights(self) -> tuple[Tensor, ...]:
        """What else keys and values are made of."""

    @property
    @abstractmethod
    def names(self) -> str:
        """What the caller calls the tensors."""

    @property
    @abstractmethod
    def facts(self) -> str:
        """What all ranks have to agree on, as text."""

    @property
    @abstractmethod
    def problem(self) -> str:
        """What is wrong with this rank's heads and tensors; empty where nothing is."""

    @property
    @abstractmethod
    def key_heads(self) -> tuple[tuple[int, int], ...]:
        """See :class:`Work`."""

    @property
    @abstractmethod
    def value_width(self) -> int:
        """Hv."""

    @abstractmethod
    def source(self, most: int) -> Callable[[Sequence[Tensor], Sequence[bool]], Source]:
        """See :class:`Spread`. ``most``: rows that are expanded at once."""

    @abstractmethod
    def keys_and_values(self, keys: Sequence[Tensor]) -> Sequence[Tensor]:
        """k and v of this rank's heads, batch first, in the graph of what came for them."""

    @property
    def device(self) -> torch.device:
        """Where this rank's words are made: they have to reach the peers in any case."""
        return device_for(self.tensors, self.group)

    @property
    def spread_facts(self) -> str:
        """Heads and places, as text."""
        return (
            f"query heads {constants(self.heads.query.sizes)}, {index(self.heads.num_kv)} key/value heads, "
            f"{index(self.sharding.batch.total)} rows of {told(self.sharding)}, keys {told(self.kv_sharding)}"
        )


def sharding_of_keys(
    sharding: TokenSharding, kv_sharding: TokenSharding | None, group: dist.ProcessGroup
) -> TokenSharding:
    """That of the queries, if left out.

    Raises:
        ValueError: shardings that cannot be.
    """
    kv_sharding = sharding if kv_sharding is None else kv_sharding
    for each in (sharding, kv_sharding):
        check_sharding(each, group)
    if kv_sharding.order != sharding.order or kv_sharding.batch.total != sharding.batch.total:
        raise ValueError(
            f"queries are {sharding}, keys and values {kv_sharding}; they may differ in the sequence only, not "
            "in the batch or the order"
        )
    return kv_sharding


def problem_of_tensors(names: str, tensors: Sequence[Tensor], group: dist.ProcessGroup) -> str:
    """What is wrong with their dtypes and devices; empty where nothing is."""
    dtypes, devices = (
        ", ".join(map(str, each)) for each in zip(*((x.dtype, x.device) for x in tensors), strict=True)
    )
    if len({x.dtype for x in tensors}) > 1 or not tensors[0].is_floating_point():
        return f"{names} are {dtypes}; cast them to one floating-point dtype"
    if tensors[0].itemsize < BYTES_OF_DTYPE:
        return f"{names} are {tensors[0].dtype}; cast them to a floating-point dtype of at least 16 bits"
    if len({x.device for x in tensors}) > 1:
        return f"{names} are on {devices}; move them to one device"
    if tensors[0].is_meta:
        return f"{names} are on meta, where there are no values to send; give them memory, e.g. module.to_empty()"
    if not carries(group, tensors[0].device):
        there = device_for([], group)
        return f"{names} are on {tensors[0].device}, but the group communicates on {there}; move them there"
    return ""


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
