"""Dispatch: each token's row to the experts it chose, by any plan."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan.hierarchical import HierarchicalPlan
from ..plan.planner import Plan
from ..wire.local_tensors import problem_of_dtensors
from ..wire.uncompiled import uncompiled
from .buffer import RowFormats
from .functions import FinishBetween, FinishDispatch, StartDispatch
from .row_exchange import RowExchange
from .sums import SUMMED


@dataclass(frozen=True, slots=True, eq=False)
class PendingDispatch:
    """Rows on their way to the experts. Call :meth:`finish` once."""

    _plan: Plan
    _link: Tensor
    _exchange: RowExchange
    _formats: RowFormats

    @uncompiled("each plan would be another graph; move rows outside of what is compiled")
    def finish(self) -> tuple[Tensor, Tensor]:
        """Wait for the rows: what :func:`dispatch` returns. RuntimeError the second time."""
        on_their_way = self._link, self._exchange, self._formats
        if isinstance(self._plan, HierarchicalPlan):
            x_RD, weight_RK = FinishBetween.apply(*on_their_way)  # type: ignore[misc]
            return dispatch(x_RD.unsqueeze(0), weight_RK.unsqueeze(0), self._plan.within)
        return FinishDispatch.apply(*on_their_way)  # type: ignore[return-value]


def dispatch(x_BlD: Tensor, weight_BlK: Tensor, metadata: Plan) -> tuple[Tensor, Tensor]:
    """Bring each token's row, with its routing weights, to the experts it chose. One collective; one more in
    backward. By a hierarchical plan two, one between nodes and one within, and as many in backward.

    A token crosses to a rank once, however many of its experts live there, and is copied there. Between nodes, it
    crosses to a node once.

    Args:
        x_BlD: ``metadata.local_shape``, this rank's tokens.
        weight_BlK: (b, l, K), or (l, b, K), the weight of each choice; its dtype may differ from that of ``x_BlD``.
        metadata: the plan of these tokens, of any kind.

    Returns:
        ``x_MD`` (M, D) and ``weight_M`` (M,): one row per choice that fell on an expert of this rank, by expert, then
        global token, then choice; ``metadata.rows_per_expert_e`` says how many each expert got. The same bits for
        every kind of plan; by a static plan, rows of zeros follow.

    The gradient of a token is the sum over its rows, taken in float32 (float64 for float64) and rounded to the rows'
    dtype once for each wire and once for the result.

    Raises:
        ValueError: a shape or dtype that does not fit the plan. Only this rank can see it, so it is raised here and
            not on its peers: pass ``weight_BlK`` to :func:`plan_dispatch`, and check the rest where all ranks take
            the same path. Or rows or weights in a dtype without sums (float8) that have a gradient; without one
            they travel as they are.
    """
    return start_dispatch(x_BlD, weight_BlK, metadata).finish()


@uncompiled("each plan would be another graph; move rows outside of what is compiled")
def start_dispatch(x_BlD: Tensor, weight_BlK: Tensor, metadata: Plan) -> PendingDispatch:
    """:func:`dispatch` in the background: what is computed before ``finish()`` overlaps with the exchange, and its
    backward with the exchange backward. Every rank calls both, in the same order among its collectives. By a
    hierarchical plan, the exchange between nodes is in the background.

    Args, Raises: as :func:`dispatch`.
    """
    _check_tokens(x_BlD, weight_BlK, metadata)
    x_tD, weight_tK = x_BlD.flatten(0, 1), weight_BlK.flatten(0, 1)
    first_step = metadata.between if isinstance(metadata, HierarchicalPlan) else metadata
    exchange, formats = RowExchange(first_step), RowFormats.of(x_tD, weight_tK, first_step.row_index.rides)
    link: Tensor = StartDispatch.apply(x_tD, weight_tK, exchange, formats)  # type: ignore[assignment]
    return PendingDispatch(metadata, link, exchange, formats)


def _check_tokens(x_BlD: Tensor, weight_BlK: Tensor, metadata: Plan) -> None:
    """ValueError unless tokens and weights are those that the plan was made for."""
    if problem := problem_of_dtensors(x_BlD=x_BlD, weight_BlK=weight_BlK):
        raise ValueError(f"rank {metadata.rank}: {problem}")
    if tuple(x_BlD.shape) != metadata.local_shape or not x_BlD.is_floating_point():
        raise ValueError(
            f"rank {metadata.rank}: x is {tuple(x_BlD.shape)} of {x_BlD.dtype}, but the plan was made for "
            f"{metadata.local_shape}; pass the floating-point tokens that the plan's expert ids belong to"
        )
    if weight_BlK.shape != metadata.expert_BlK.shape or not weight_BlK.is_floating_point():
        raise ValueError(
            f"rank {metadata.rank}: weights are {tuple(weight_BlK.shape)} of {weight_BlK.dtype}, but the plan was "
            f"made from ids of shape {tuple(metadata.expert_BlK.shape)}; each choice needs one floating-point weight"
        )
    low = [x.dtype for x in (x_BlD, weight_BlK) if x.dtype not in SUMMED]
    if low and torch.is_grad_enabled() and (x_BlD.requires_grad or weight_BlK.requires_grad):
        raise ValueError(
            f"rank {metadata.rank}: rows or weights of {low[0]} with a gradient, which is a sum in that dtype, and "
            "there is none; detach rows and weights, or dispatch them in torch.bfloat16"
        )
