"""An ``expand`` of the caller's, which makes keys and values of latents."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint

from ..attend.empty import zero_in_graph

Expand = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Expansion:
    """What one rank makes of latents: its own key/value heads.

    Attributes:
        expand: ``expand(latent_BLC, *weights, heads=range) -> (k_BLgH, v_BLgV)``.
        heads: the key/value heads of this rank.
        widths: (H, Hv).
        dtype: of keys and values.
        autocast: makes a context in which autocast is as it was where the caller called.
    """

    expand: Expand
    heads: range
    widths: tuple[int, int]
    dtype: torch.dtype
    autocast: Callable[[], AbstractContextManager[Any]]

    def __call__(self, latent_BLC: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """k (B, L, g, H) and v (B, L, g, Hv).

        Raises:
            ValueError: what ``expand`` gave or raised.
        """
        if not latent_BLC.numel() or not self.heads:
            zero = zero_in_graph([latent_BLC, *weights], self.dtype)
            shape = (*latent_BLC.shape[:2], len(self.heads))
            k_BLgH, v_BLgV = (latent_BLC.new_zeros(*shape, width, dtype=self.dtype) + zero for width in self.widths)
            return k_BLgH, v_BLgV
        given, problem = expanded(self, latent_BLC, weights)
        widths = tuple(x.shape[3] for x in given)
        if not problem and widths != self.widths:
            problem = f"expand gave widths {widths} for {tuple(latent_BLC.shape)}, and {self.widths} before"
        if problem:
            raise ValueError(problem)
        return given[0], given[1]


def unseen_by_hooks() -> AbstractContextManager[object]:
    """For a graph that is used at once or never: hooks of the caller's would copy what it saves, offloading all
    weights."""
    return saved_tensors_hooks(_same, _same)


def _same(x: Tensor) -> Tensor:
    return x


def expanded(expansion: Expansion, latent_BLC: Tensor, weights: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], str]:
    """What ``expand`` gives for some latents, of any value width, and what is wrong with it; empty where nothing
    is."""
    try:
        with expansion.autocast():
            given: Any = expansion.expand(latent_BLC, *weights, heads=expansion.heads)
    except checkpoint._StopRecomputationError:  # everything that backward needs is there again
        raise
    except Exception as error:
        return (), f"expand raised {type(error).__name__}: {error}"
    wanted = (*latent_BLC.shape[:2], len(expansion.heads))
    if not isinstance(given, tuple | list) or len(given) != 2 or not all(isinstance(x, Tensor) for x in given):
        got = f"{type(given).__name__}"
    elif (
        all(x.ndim == 4 and tuple(x.shape[:3]) == wanted and x.dtype == expansion.dtype for x in given)
        and given[0].shape[3] == expansion.widths[0]
    ):
        return tuple(given), ""
    else:
        got = " and ".join(f"{tuple(x.shape)} of {x.dtype}" for x in given)
    return (), (
        f"expand gave {got} for latents {tuple(latent_BLC.shape)} and heads {expansion.heads}; it has to give keys "
        f"{(*wanted, expansion.widths[0])} and values (B, L, heads, any width) of {expansion.dtype}"
    )
