"""How keys and values come of what travels: as they are, or expanded from latents a block at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..blocks.pieces import Piece
from ..dtypes import dtype_of_sums
from ..work.key_blocks import blocks_of_keys
from ..work.runs import Run
from .expansion import Expansion, unseen_by_hooks

Tensors = Sequence[Tensor]
KeysAndValues = tuple[Tensor, Tensor]
# Of keys and values, the sums that their gradients are added to, and the pieces of these rows.
AddGradients = Callable[[KeysAndValues, Tensors, Sequence[Piece]], None]


class Source(Protocol):
    """Makes keys and values of the tensors of a turn, (B, rows, heads, width).

    Attributes:
        weight_sums: for each weight that it uses, where its gradients are added, float32 or float64; None for one
            that wants none.
    """

    weight_sums: Sequence[Tensor | None]

    def blocks(self, came: Tensors, pieces: Sequence[Piece]) -> Iterator[tuple[KeysAndValues, Sequence[Piece]]]:
        """Keys and values, some rows at a time, and the pieces of these rows."""
        ...

    def add_gradients(self, came: Tensors, sums: Tensors, pieces: Sequence[Piece], add: AddGradients) -> None:
        """Add the gradients of ``came`` to ``sums``, which are wide, given how those of keys and values are added."""
        ...


class AsSent:
    """Keys and values travel."""

    def __init__(self, _weights: Tensors, _learns: Sequence[bool]) -> None:
        self.weight_sums: Sequence[Tensor | None] = ()

    def blocks(self, came: Tensors, pieces: Sequence[Piece]) -> Iterator[tuple[KeysAndValues, Sequence[Piece]]]:
        yield (came[0], came[1]), pieces

    def add_gradients(self, came: Tensors, sums: Tensors, pieces: Sequence[Piece], add: AddGradients) -> None:
        add((came[0], came[1]), sums, pieces)


class FromLatent:
    """One latent travels. Only the rows that some query sees are expanded, ``most`` at once, and again in backward:
    what lies between documents may hold anything, and the keys of a whole turn are never there together.

    Args:
        expansion: of this rank.
        most: rows.
        weights, learns: of ``expand``, and whether each wants a gradient.
    """

    def __init__(self, expansion: Expansion, most: int, weights: Tensors, learns: Sequence[bool]) -> None:
        self.expansion, self.most, self.weights, self.learns = expansion, most, weights, learns
        self.weight_sums: Sequence[Tensor | None] = [
            x.new_zeros(x.shape, dtype=dtype_of_sums(x)) if learned else None
            for x, learned in zip(weights, learns, strict=True)
        ]

    def blocks(self, came: Tensors, pieces: Sequence[Piece]) -> Iterator[tuple[KeysAndValues, Sequence[Piece]]]:
        for (start, stop), part in self._rows(came, pieces):
            yield self.expansion(came[0][:, start:stop, 0], self.weights), part

    def add_gradients(self, came: Tensors, sums: Tensors, pieces: Sequence[Piece], add: AddGradients) -> None:
        for (start, stop), part in self._rows(came, pieces):
            latent_BLC = came[0][:, start:stop, 0].detach().requires_grad_()
            weights = [x.detach().requires_grad_(on) for x, on in zip(self.weights, self.learns, strict=True)]
            with torch.enable_grad(), unseen_by_hooks():
                made = self.expansion(latent_BLC, weights)
            grads = [x.new_zeros(x.shape, dtype=dtype_of_sums(x)) for x in made]
            add((made[0].detach(), made[1].detach()), grads, part)
            pairs = [(x, grad.to(x.dtype)) for x, grad in zip(made, grads, strict=True) if x.requires_grad]
            into = [sums[0][:, start:stop, 0], *(x for x in self.weight_sums if x is not None)]
            wanted = [latent_BLC, *(x for x in weights if x.requires_grad)]
            for total, grad in zip(into, _gradients(pairs, wanted), strict=True):
                if grad is not None:
                    total.add_(grad)

    def _rows(self, came: Tensors, pieces: Sequence[Piece]) -> Iterator[tuple[Run, Sequence[Piece]]]:
        return blocks_of_keys(pieces if came[0].numel() else (), self.most)


def _gradients(pairs: Sequence[tuple[Tensor, Tensor]], wanted: Tensors) -> Sequence[Tensor | None]:
    """Of what is wanted, given pairs of a tensor and its gradient; None for what they do not depend on."""
    if not pairs:
        return [None] * len(wanted)
    outs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outs, wanted, grads, allow_unused=True)
