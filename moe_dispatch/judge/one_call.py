"""A subject judged in one call, for anybody's tests."""

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from .compare import compare
from .layout import Layout
from .results import Difference, Settings, Tolerance
from .subject import Subject, problem_of_subject
from .train import run_on_mesh, run_reference
from .words import words_of

# About ten times what models of 2 to 6 layers and widths up to 256 gave.
TOLERANCES = MappingProxyType(
    {
        torch.float64: Tolerance(logits=1e-12, loss=1e-12, gradients=1e-12, loss_curve=1e-12),
        torch.float32: Tolerance(logits=5e-5, loss=1e-5, gradients=5e-5, loss_curve=1e-5),
    }
)
STEPS = 2
SETTINGS = Settings(learning_rate=1e-3, weight_decay=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far a subject on a mesh is from itself in one process.

    Attributes:
        differences: one for each of logits, loss, gradients and loss curve.
        words: what is wrong, where the numbers tell.
    """

    differences: tuple[Difference, ...]
    words: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        return all(difference.agrees for difference in self.differences)

    def __str__(self) -> str:
        lines = [
            f"{difference.quantity}: off by {difference.value:.1e} ({'allowed' if difference.agrees else 'DIFFERS'}: "
            f"{difference.tolerance:.0e}), most at {difference.where}"
            for difference in self.differences
        ]
        return "\n".join([*lines, *self.words])


def compare_with_one_process(subject: Subject, layout: Layout, dtype: torch.dtype) -> Comparison:
    """Train ``subject`` for two steps on the ranks of the default group, and in this process by itself, and compare.

    Every rank calls it, in processes or in threads (``RankPool``, ``RankThreads``), and gets the same answer.

    Args:
        subject: the model, the same on every rank.
        layout: the mesh and the shape of the batch; its ``dp * sp * tp`` is the number of ranks.
        dtype: torch.float64, whose limit is 1e-12, or torch.float32 (5e-5 for logits and gradients, 1e-5 for losses),
            relative to the largest value of each kind. Values that are float32 inside of a float64 model are seen.

    Raises:
        ValueError: ``subject`` lacks a method; another dtype; a mesh that cannot be; a whole model that differs
            between ranks.
    """
    if problem := problem_of_subject(subject):
        name = getattr(subject, "__name__", type(subject).__name__)  # of a module of functions, or of a class
        raise ValueError(f"{name} cannot be judged: {problem}; see moe_dispatch.testing.Subject")
    if dtype not in TOLERANCES:
        raise ValueError(f"dtype is {dtype}; only float64 and float32 have limits that rounding does not reach")
    token_SBL = made_up_tokens(layout)
    reference = run_reference(subject, layout, dtype, token_SBL, SETTINGS)
    found = run_on_mesh(subject, layout, dtype, token_SBL, SETTINGS)
    differences = compare(found.training, reference, TOLERANCES[dtype])
    return Comparison(differences=differences, words=words_of(differences, found, reference, layout))


def made_up_tokens(layout: Layout) -> Tensor:
    """(S, B, L) uint8, random, the same everywhere."""
    draw = torch.Generator("cpu").manual_seed(0)
    return torch.randint(256, (STEPS, *layout.shape), generator=draw, dtype=torch.uint8, device="cpu")
