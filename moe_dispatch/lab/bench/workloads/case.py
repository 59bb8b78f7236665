"""One rank's tensors, and what has to come out of them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One rank's tensors, and what has to come out of them, in float64.

    Attributes:
        inputs: in the order of ``forward``.
        leaves: those of them that take a gradient.
        grad_out: gradient of the output.
        out, grads: the right output, and the right gradient of each leaf.
    """

    inputs: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    grad_out: Tensor
    out: Tensor
    grads: tuple[Tensor, ...]
