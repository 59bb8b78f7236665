"""The order of a sharding: "BL" is batch first, "LB" is sequence first.

Attention and batches work batch first. Here tensors are turned, as views.
"""

from torch import Tensor

from moe_dispatch import TokenSharding


def batch_first(x: Tensor, sharding: TokenSharding) -> Tensor:
    """(B, L, ...) of a tensor in the order of ``sharding``."""
    return x if sharding.order == "BL" else x.transpose(0, 1)


def in_order(x_BL: Tensor, sharding: TokenSharding) -> Tensor:
    """A tensor (B, L, ...) in the order of ``sharding``: the inverse of :func:`batch_first`."""
    return x_BL if sharding.order == "BL" else x_BL.transpose(0, 1)


def token_dim(sharding: TokenSharding) -> int:
    """The dimension of the sequence in a tensor that ends in (B, l), or in (l, B)."""
    return -1 if sharding.order == "BL" else -2


def dim_of_tokens(sharding: TokenSharding) -> int:
    """The dimension of the sequence in a tensor (B, l, ...), or (l, B, ...)."""
    return 1 if sharding.order == "BL" else 0
