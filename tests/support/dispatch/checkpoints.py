"""Ways to run an MoE layer, with its activations kept or recomputed, and what it remembers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dispatch import MoE, TokenSharding
from moe_dispatch.layer.recompute import ForwardMemory
from tests.support.ranks import comes_true

Run = Callable[[MoE, Tensor, TokenSharding], tuple[Tensor, Tensor]]


def plainly(moe: MoE, x_BlD: Tensor, sharding: TokenSharding) -> tuple[Tensor, Tensor]:
    return moe(x_BlD, sharding=sharding)


def recomputed(moe: MoE, x_BlD: Tensor, sharding: TokenSharding) -> tuple[Tensor, Tensor]:
    return checkpoint(moe, x_BlD, sharding=sharding, use_reentrant=False)  # pyright: ignore[reportReturnType]


def recomputed_reentrantly(moe: MoE, x_BlD: Tensor, sharding: TokenSharding) -> tuple[Tensor, Tensor]:
    def forward(x_BlD: Tensor) -> tuple[Tensor, Tensor]:
        return moe(x_BlD, sharding=sharding)

    return checkpoint(forward, x_BlD, use_reentrant=True)  # pyright: ignore[reportReturnType]


def twice_reentrantly(moe: MoE, x_BlD: Tensor, sharding: TokenSharding) -> tuple[Tensor, Tensor]:
    """A reentrant checkpoint inside of one."""

    def forward(x_BlD: Tensor) -> tuple[Tensor, Tensor]:
        return recomputed_reentrantly(moe, x_BlD, sharding)

    return checkpoint(forward, x_BlD, use_reentrant=True)  # pyright: ignore[reportReturnType]


def remembers_nothing(moe: MoE) -> bool:
    return is_empty(moe._plans) and comes_true(lambda: not moe._chosen._made)


def is_empty(memory: ForwardMemory[Any]) -> bool:
    """Soon: see ``comes_true``. No garbage has to be collected for it."""
    return comes_true(lambda: not memory._made and not memory._recalled)
