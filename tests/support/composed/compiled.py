"""A module compiled with torch's default backend, on the 2 ranks of its layout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.compile import untraced
from tests.support.composed.subjects import LAYOUTS, made, shards_of
from tests.support.composed.ways import Answers, answers
from tests.support.ranks import world


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """How it is compiled.

    Attributes:
        around: what is compiled, of the module.
        dtype: of the module and its tokens.
        tolerance: relative to the largest value of a tensor, or to 1.
        learns: with gradients.
    """

    dtype: torch.dtype
    tolerance: float
    around: Callable[[nn.Module], Callable[[Tensor], Any]] = lambda module: module
    learns: bool = True

    @untraced()
    def off_by(self, rank: int, what: str, layout: str, difference: Callable[[Tensor, Tensor], float]) -> float:
        """How far the compiled module is from itself, at most."""
        torch._dynamo.reset()
        wanted, got = (self.answers(rank, what, layout, compiled) for compiled in (False, True))
        assert got.keys() == wanted.keys()
        return max(difference(got[name], wanted[name]) for name in wanted)

    def answers(self, rank: int, what: str, layout: str, compiled: bool) -> Answers:
        module = made(what, LAYOUTS[layout], world()).to(self.dtype)
        run = torch.compile(self.around(module)) if compiled else self.around(module)
        x_BlD, pull_BlD = shards_of(LAYOUTS[layout], rank, self.dtype)
        if self.learns:
            return answers(run, dict(module.named_parameters()), x_BlD, pull_BlD)
        with torch.no_grad():
            return {"y": run(x_BlD)}


def recomputed(module: nn.Module) -> Callable[[Tensor], Any]:
    def block(x_BlD: Tensor) -> Any:
        return checkpoint(module, x_BlD, use_reentrant=False)

    return block


COMPILED = {
    "torch.compile, float32": Compiled(dtype=torch.float32, tolerance=1e-5),
    "torch.compile, bfloat16": Compiled(dtype=torch.bfloat16, tolerance=0.03),
    "torch.compile, float16": Compiled(dtype=torch.float16, tolerance=0.005),
    "torch.compile, without gradients": Compiled(dtype=torch.float32, tolerance=1e-5, learns=False),
    "torch.compile of a checkpointed block": Compiled(dtype=torch.float32, tolerance=1e-5, around=recomputed),
}
