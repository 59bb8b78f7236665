"""The tensors of one call of attention, and what this rank knows of them before anything is sent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.internals import cast_to_autocast, most, problem_of_dtensors

from ..spread.source import AsSent, Source
from ..wire.heads import heads_of_call
from ..wire.splits import Split
from ..work.scheme import Scheme, head_rank
from .call_inputs import Inputs, constants, problem_of_tensors, sharding_of_keys


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionInputs(Inputs):
    """Queries, keys and values of this rank, with their shardings and heads.

    Attributes:
        k_BlGH, v_BlGH: as the queries.
    """

    k_BlGH: Tensor
    v_BlGH: Tensor

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
        kv_sharding = sharding_of_keys(sharding, kv_sharding, group)
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
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """What q, k and v have to be on this rank, given the shardings, the head counts and the widths of q and v."""
        width = self.q_BlNH.shape[3] or self.k_BlGH.shape[3]
        kv_local = self.kv_sharding.local_shape(self.rank)
        q_shape = (*self.sharding.local_shape(self.rank), self.heads.query.total, width)
        k_shape = (*kv_local, self.heads.num_kv, width)
        return q_shape, k_shape, (*kv_local, self.heads.num_kv, self.v_BlGH.shape[3])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_BlNH, self.k_BlGH, self.v_BlGH

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return ()

    @property
    def names(self) -> str:
        return "q, k, v"

    @property
    def key_heads(self) -> tuple[tuple[int, int], ...]:
        return self.heads.kv_spans

    @property
    def value_width(self) -> int:
        return self.v_BlGH.shape[3]

    def source(self, most: int) -> Callable[[Sequence[Tensor], Sequence[bool]], Source]:
        return AsSent

    def keys_and_values(self, keys: Sequence[Tensor]) -> Sequence[Tensor]:
        return keys

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        """Of q, k and v over the ranks; k and v by the heads that each rank needs."""
        kv = Split(sharding=self.kv_sharding, heads=self.heads.kv_sent)
        return Split(sharding=self.sharding, heads=self.heads.query), kv, kv

    @property
    def facts(self) -> str:
        q_shape, _, v_shape = self.shapes
        return f"{self.q_BlNH.dtype}, widths {constants((q_shape[3], v_shape[3]))}, {self.spread_facts}"

    @property
    def problem(self) -> str:
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
        return problem_of_tensors(self.names, self.tensors, self.group)

    def stand_ins(self) -> tuple[Tensor, ...]:
        """Zeros that a rank with a problem sends instead: of the shapes that its peers expect, and of the dtype that
        most of q, k, v have."""
        dtype = most([x.dtype for x in self.tensors])
        return tuple(torch.zeros(shape, dtype=dtype, device=self.device) for shape in self.shapes)
