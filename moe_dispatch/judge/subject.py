"""What can be judged: a model that can be built whole, and in shares over the ranks of a mesh."""

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from .. import ParallelMesh, TokenSharding
from .layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What a step found; it left its gradients in the parameters.

    Attributes:
        logits_BlV: (b, l, V), or (l, b, V), of this process's tokens.
        loss: (), this process's share: the shares of all ranks sum to the loss of one process.
        tokens: which of all tokens each rank has the logits of, in the order of the default group.
    """

    logits_BlV: Tensor
    loss: Tensor
    tokens: TokenSharding


class Subject(Protocol):
    """A model to be judged: an object, or a module of functions, with these five methods.

    Tokens are bytes of a text: 0 to 255. A model that is random in training (dropout) cannot be compared.
    """

    def whole(self, layout: Layout) -> nn.Module:
        """The model of one process. Each rank builds it, too, and it has to be the same everywhere: seed it. It is
        cast to the dtype that is judged."""
        ...

    def share(self, whole: nn.Module, layout: Layout, mesh: ParallelMesh) -> nn.Module:
        """This rank's share of the weights of ``whole``, ready to train on ``mesh``; every rank calls it."""
        ...

    def step_whole(self, model: nn.Module, token_BL: Tensor, layout: Layout) -> Outcome:
        """Forward and backward of one batch in one process.

        Args:
            model: what :meth:`whole` made.
            token_BL: (B, L) int64.
        """
        ...

    def step_share(self, model: nn.Module, token_BL: Tensor, layout: Layout, mesh: ParallelMesh) -> Outcome:
        """This rank's part of :meth:`step_whole`: it cuts the batch, and sums the gradients that are to be summed.

        Args:
            model: what :meth:`share` made.
            token_BL: (B, L) int64, the whole batch, the same on every rank.
        """
        ...

    def whole_gradient(self, name: str, gradient: Tensor, layout: Layout, mesh: ParallelMesh) -> Tensor:
        """A parameter's whole gradient, out of the ranks' shares of it; every rank calls it for every parameter, in
        one order.

        Args:
            name: of the parameter, as ``named_parameters`` says.
            gradient: this rank's; a DTensor's is whole already, over its mesh.
        """
        ...


def problem_of_subject(subject: Any) -> str:
    """What ``subject`` lacks; empty where it has everything."""
    problems = []
    for name, method in vars(Subject).items():
        if name.startswith("_") or not inspect.isfunction(method):
            continue
        wanted = list(inspect.signature(method).parameters)[1:]
        got = getattr(subject, name, None)
        call = f"{name}({', '.join(wanted)})"
        if not callable(got):
            problems.append(f"it has no {call}")
        elif not _takes(got, len(wanted)):
            problems.append(f"its {name}{inspect.signature(got)} has to be {call}")
    return "; ".join(problems)


def _takes(function: Any, count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    return True
