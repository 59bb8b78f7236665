"""The tensors of one call of attention whose keys and values are made of latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.internals import autocast_as_now, cast_to_autocast, problem_of_dtensors

from ...spread.expansion import Expansion
from ...spread.source import FromLatent, Source
from ...wire.heads import heads_of_call
from ...wire.order import batch_first
from ...work.scheme import Scheme, head_rank
from ..call_inputs import Inputs, problem_of_tensors, sharding_of_keys
from .trial import trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """What a caller gives for keys and values. Any values: see :meth:`LatentInputs.of` and its ``problem``.

    Attributes:
        latent_BlC: (B, l, C), or (l, B, C) for order "LB".
        expand: see :func:`latent_attention_over_ranks`.
        weights: further arguments of it.
        kv_heads: G; as many as query heads if left out.
    """

    latent_BlC: Any
    expand: Any
    weights: Any
    kv_heads: Any


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentInputs(Inputs):
    """Queries and latents of this rank, with their shardings and heads.

    Attributes:
        latent_BlC: as the queries.
        given_weights: of ``expand``.
        expansion: on this rank.
        problem_of_expand: what its trial found; empty where nothing is wrong.
    """

    latent_BlC: Tensor
    given_weights: tuple[Tensor, ...]
    expansion: Expansion
    problem_of_expand: str

    @classmethod
    def of(
        cls,
        q_BlNH: Tensor,
        latent: Latent,
        sharding: TokenSharding,
        kv_sharding: TokenSharding | None,
        heads: Partition | None,
        group: dist.ProcessGroup,
        scheme: Scheme,
    ) -> "LatentInputs":
        """Look at all of it, and try ``expand``.

        Raises:
            ValueError: dimensions, head counts, shardings, a scheme, or an ``expand`` or weights that cannot be.
        """
        _check(q_BlNH, latent)
        kv_sharding = sharding_of_keys(sharding, kv_sharding, group)
        team_size = scheme.team_size(group.size())
        num_kv = q_BlNH.shape[2] if latent.kv_heads is None else latent.kv_heads
        grouped, problem_of_heads = heads_of_call(q_BlNH.shape[2], (num_kv, num_kv), heads, team_size)
        q_BlNH, latent_BlC = cast_to_autocast(q_BlNH), cast_to_autocast(latent.latent_BlC)
        rank_of_team = head_rank(group.rank(), team_size)
        inputs = cls(
            q_BlNH=q_BlNH,
            latent_BlC=latent_BlC,
            given_weights=tuple(latent.weights),
            expansion=Expansion(
                expand=latent.expand,
                heads=grouped.kv_ranges[rank_of_team],
                widths=(q_BlNH.shape[3], 0),
                dtype=q_BlNH.dtype,
                autocast=autocast_as_now(latent_BlC),
            ),
            problem_of_expand="",
            sharding=sharding,
            kv_sharding=kv_sharding,
            scheme=scheme,
            heads=grouped,
            problem_of_heads=problem_of_heads,
            group=group,
            rank=group.rank(),
            head_rank=rank_of_team,
        )
        return inputs if inputs.problem else inputs._tried()

    def _tried(self) -> "LatentInputs":
        """With the width of values. A rank without heads tries the first one: all ranks have to know the width."""
        expansion = replace(self.expansion, heads=self.expansion.heads or range(1))
        width, problem = trial(expansion, batch_first(self.latent_BlC, self.kv_sharding), self.given_weights)
        expansion = replace(self.expansion, widths=(self.expansion.widths[0], width))
        return replace(self, expansion=expansion, problem_of_expand=problem)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.q_BlNH, self.latent_BlC.unsqueeze(2)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.given_weights

    @property
    def names(self) -> str:
        return "q, the latent"

    @property
    def facts(self) -> str:
        learned = torch.is_grad_enabled() and any(x.requires_grad for x in self.weights)
        return (
            f"{self.q_BlNH.dtype}, latents of {self.latent_BlC.shape[2]} for widths {self.expansion.widths}, "
            f"gradients of weights {learned}, {self.spread_facts}"
        )

    @property
    def problem(self) -> str:
        if problem := problem_of_dtensors(q=self.q_BlNH, latent=self.latent_BlC):
            return problem
        if self.problem_of_heads:
            return self.problem_of_heads
        local, kv_local = self.sharding.local_shape(self.rank), self.kv_sharding.local_shape(self.rank)
        shapes = (
            ("q", self.q_BlNH, (*local, self.heads.query.total, self.q_BlNH.shape[3])),
            ("the latent", self.latent_BlC, (*kv_local, self.latent_BlC.shape[2])),
        )
        for name, x, shape in shapes:
            if tuple(x.shape) != shape:
                return (
                    f"{name} is {tuple(x.shape)}, but this rank's shard in order {self.sharding.order!r} is {shape}; "
                    "pass the tokens that the sharding gives this rank"
                )
        if problem := problem_of_tensors(self.names, self.tensors, self.group):
            return problem
        for i, x in enumerate(self.weights):
            if problem := problem_of_dtensors(**{f"weights[{i}]": x}):
                return problem
            if x.device != self.q_BlNH.device:
                return f"weights[{i}] is on {x.device}, but {self.names} on {self.q_BlNH.device}; move it there"
        return self.problem_of_expand

    @property
    def key_heads(self) -> tuple[tuple[int, int], ...]:
        return self.heads.latent_spans

    @property
    def value_width(self) -> int:
        return self.expansion.widths[1]

    def source(self, most: int) -> Callable[[Sequence[Tensor], Sequence[bool]], Source]:
        return partial(FromLatent, self.expansion, most)

    def keys_and_values(self, keys: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.expansion(keys[0].flatten(2), self.weights)


def _check(q_BlNH: Any, latent: Latent) -> None:
    for name, x, dims in (("q", q_BlNH, "(B, l, heads, width)"), ("the latent", latent.latent_BlC, "(B, l, width)")):
        if not isinstance(x, Tensor) or x.ndim != len(dims.split(",")) or not x.shape[-1]:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} is {got}; it has to be {dims}, or sequence first, and as wide as at least 1")
    if not callable(latent.expand):
        raise ValueError(
            f"expand is {latent.expand!r}; a latent needs a function expand(latent_BLC, *weights, heads) that gives "
            "the keys and values of these heads"
        )
    if not isinstance(latent.weights, tuple | list) or not all(isinstance(x, Tensor) for x in latent.weights):
        raise ValueError(f"weights is {type(latent.weights).__name__}; it has to be a tuple of tensors")
    num = latent.kv_heads
    if num is not None and (isinstance(num, bool) or not isinstance(num, Integral) or num < 1):
        raise ValueError(f"kv_heads is {num!r}; it is how many key/value heads there are, an int of at least 1")
