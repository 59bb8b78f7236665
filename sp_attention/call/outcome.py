"""The output of an ``attend`` of the caller's, or why there is none."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from moe_dispatch.internals import Statement

Attend = Callable[..., Tensor]
HAS_OUTPUT = "it has an output"


class RecomputedSoFar(torch.autograd.Function):
    """The identity; saves an empty tensor. A checkpoint recomputes on the ranks on which backward asks for something
    saved, and as far as that: so it does on all of them, through the exchange there and not the one back, whatever
    their ``attend`` saves."""

    @staticmethod
    def forward(ctx: Any, out_BLnH: Tensor) -> Tensor:
        ctx.save_for_backward(out_BLnH.new_empty(0))
        return out_BLnH.view_as(out_BLnH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return grads[0]


def output_or_problem(
    attend_whole: Callable[[], Tensor], q_BLnH: Tensor, value_width: int
) -> tuple[Tensor, Statement]:
    """The output, and that there is one. Or zeros, which the peers wait for all the same, and why there is none."""
    wanted = (*q_BLnH.shape[:3], value_width)
    if torch.compiler.is_compiling():
        out_BLnH = attend_whole()
    else:
        try:
            out_BLnH = attend_whole()
        except checkpoint._StopRecomputationError:  # everything that backward needs is there again
            raise
        except Exception as error:
            problem = f"attend raised {type(error).__name__}: {error}"
            return q_BLnH.new_zeros(wanted), Statement(HAS_OUTPUT, problem, error)
    if not isinstance(out_BLnH, Tensor):
        got = type(out_BLnH).__name__
    elif tuple(out_BLnH.shape) == wanted and out_BLnH.dtype == q_BLnH.dtype:
        return out_BLnH, Statement(HAS_OUTPUT)
    else:
        got = f"{tuple(out_BLnH.shape)} of {out_BLnH.dtype}"
    problem = f"attend gave {got}; it has to give (B, L, my query heads, value width) = {wanted} of {q_BLnH.dtype}"
    return q_BLnH.new_zeros(wanted), Statement(HAS_OUTPUT, problem)
