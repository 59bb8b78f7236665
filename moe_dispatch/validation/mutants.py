"""Known bugs of this field, put in on purpose: the run must then fail, and say which quantity differs.

That is how we know that the comparison can fail. Each mutant replaces one function of the library, in the ranks,
while a row runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from .. import balance
from ..experts import GroupedExperts
from ..metadata import DispatchMetadata
from ..moe import MoE
from ..placement import gather_tokens, place_tokens
from ..router import TopKRouter
from ..sharding import TokenSharding
from . import layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One known bug.

    Attributes:
        name: what ``--mutant`` calls it.
        description: what it does wrong.
        owner, attribute: the function it replaces.
        wrong: takes the right function, gives the wrong one.
    """

    name: str
    description: str
    owner: Any
    attribute: str
    wrong: Callable[[Callable[..., Any]], Callable[..., Any]]


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """With this mutant in place in this process; nothing for an empty name.

    Raises:
        ValueError: no such mutant.
    """
    if name and name not in MUTANTS:
        raise ValueError(f"there is no mutant {name!r}; the mutants are {', '.join(MUTANTS)}")
    if not name:
        yield
        return
    mutant = MUTANTS[name]
    right = getattr(mutant.owner, mutant.attribute)
    with patch.object(mutant.owner, mutant.attribute, mutant.wrong(right)):
        yield


def _offset_without_batch(_right: Callable[..., Any]) -> Callable[..., Any]:
    def global_token(sharding: TokenSharding, local_token: Tensor, rank: int) -> Tensor:
        return local_token + rank * sharding.local_sizes[rank]

    return global_token


def _padded_length_offset(_right: Callable[..., Any]) -> Callable[..., Any]:
    def global_token(sharding: TokenSharding, local_token: Tensor, rank: int) -> Tensor:
        length, ranks = max(sharding.seq.sizes), len(sharding.seq)
        return (local_token // length) * (length * ranks) + (rank % ranks) * length + local_token % length

    return global_token


def _weights_twice(right: Callable[..., Any]) -> Callable[..., Any]:
    def forward(experts: GroupedExperts, x_MD: Tensor, rows_per_expert_e: Tensor, weight_M: Tensor) -> Tensor:
        return right(experts, x_MD, rows_per_expert_e, weight_M * weight_M)

    return forward


def _gradients_averaged(_right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _module, _factor: None  # FSDP's own factor is the number of ranks


def _positions_from_zero(right: Callable[..., Any]) -> Callable[..., Any]:
    def positions(sharding: TokenSharding, rank: int, device: torch.device | str = "cpu") -> Tensor:
        position_t = right(sharding, rank, device)
        return position_t - position_t.min() if len(position_t) else position_t

    return positions


def _stale_plan(right: Callable[..., Any]) -> Callable[..., Any]:
    first_plans: dict[int, DispatchMetadata] = {}

    def plan(moe: MoE, scores_BlE: Tensor, sharding: TokenSharding) -> DispatchMetadata:
        if id(moe) not in first_plans:
            first_plans[id(moe)] = right(moe, scores_BlE, sharding)
        return first_plans[id(moe)]

    return plan


def _weights_without_gradient(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda router, scores_BlE, expert_BlK: right(router, scores_BlE.detach(), expert_BlK)


def _bias_in_weights(right: Callable[..., Any]) -> Callable[..., Any]:
    def weigh(router: TopKRouter, scores_BlE: Tensor, expert_BlK: Tensor) -> Tensor:
        return right(router, scores_BlE + router.expert_bias_E, expert_BlK)

    return weigh


def _weights_in_bfloat16(right: Callable[..., Any]) -> Callable[..., Any]:
    def weigh(router: TopKRouter, scores_BlE: Tensor, expert_BlK: Tensor) -> Tensor:
        return right(router, scores_BlE, expert_BlK).bfloat16().to(scores_BlE.dtype)

    return weigh


def _gather_without_sum(_right: Callable[..., Any]) -> Callable[..., Any]:
    def gather_own_gradient(x_BlD: Tensor, *, sharding: TokenSharding, group: dist.ProcessGroup) -> Tensor:
        whole_BLD = gather_tokens(x_BlD.detach(), sharding=sharding, group=group)
        mine_BLD = place_tokens(x_BlD, sharding=sharding, rank=group.rank())
        return whole_BLD + mine_BLD - mine_BLD.detach()

    return gather_own_gradient


def _balance_of_the_shard(_right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _count_BE, group: None  # counts of the rank's own tokens only


MUTANTS: dict[str, Mutant] = {
    name: Mutant(name=name, description=description, owner=owner, attribute=attribute, wrong=wrong)
    for name, description, owner, attribute, wrong in (
        (
            "offset-without-batch",
            "global token = local token + rank * local tokens",
            TokenSharding,
            "global_token",
            _offset_without_batch,
        ),
        (
            "padded-length-offset",
            "rows told apart by the longest shard's length, on shards that are not padded",
            TokenSharding,
            "global_token",
            _padded_length_offset,
        ),
        ("weights-twice", "routing weights applied twice", GroupedExperts, "forward", _weights_twice),
        (
            "gradients-averaged",
            "gradients averaged over ranks instead of summed",
            FSDPModule,
            "set_gradient_divide_factor",
            _gradients_averaged,
        ),
        (
            "positions-from-zero",
            "rotary positions start at 0 in each shard",
            TokenSharding,
            "positions",
            _positions_from_zero,
        ),
        ("stale-plan", "each MoE layer keeps the plan of its first step", MoE, "_plan", _stale_plan),
        (
            "weights-without-gradient",
            "routing weights cut off from the router",
            TopKRouter,
            "weigh",
            _weights_without_gradient,
        ),
        ("bias-in-weights", "the balancing bias enters the routing weights", TopKRouter, "weigh", _bias_in_weights),
        ("weights-in-bfloat16", "routing weights rounded to bfloat16", TopKRouter, "weigh", _weights_in_bfloat16),
        (
            "gather-without-sum",
            "the backward of gather_tokens keeps this rank's gradient only",
            layout,
            "gather_tokens",
            _gather_without_sum,
        ),
        (
            "balance-of-the-shard",
            "the balance loss counts the experts of each shard by itself",
            balance,
            "sum_counts",
            _balance_of_the_shard,
        ),
    )
}
