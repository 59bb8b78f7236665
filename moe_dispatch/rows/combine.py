"""Combine: the sum of each token's rows, back on the token's rank, by any plan."""

from dataclasses import dataclass

from torch import Tensor

from ..plan.hierarchical import HierarchicalPlan
from ..plan.metadata import DispatchMetadata
from ..plan.planner import Plan
from ..wire.local_tensors import problem_of_dtensors
from ..wire.uncompiled import uncompiled
from .functions import FinishCombine, StartCombine, StartCombineBetween, StartWeightedCombine
from .row_exchange import RowExchange
from .sums import SUMMED


@dataclass(frozen=True, slots=True, eq=False)
class PendingCombine:
    """Rows on their way back to their tokens. Call :meth:`finish` once."""

    _link: Tensor
    _exchange: RowExchange

    @uncompiled("each plan would be another graph; move rows outside of what is compiled")
    def finish(self) -> Tensor:
        """Wait for the rows: what :func:`combine` returns. RuntimeError the second time."""
        y_tD: Tensor = FinishCombine.apply(self._link, self._exchange)  # type: ignore[assignment]
        return y_tD.unflatten(0, self._exchange.plan.local_shape[:2])


def combine(y_MD: Tensor, metadata: Plan, weight_M: Tensor | None = None) -> Tensor:
    """Sum each token's rows, where they were computed and then over ranks, back on the token's rank. One collective;
    one in backward. By a hierarchical plan two, one within the node and one between nodes, and as many in backward.

    Args:
        y_MD: (M, any width), one result per row of :func:`dispatch`.
        metadata: the plan of that dispatch, of any kind.
        weight_M: (M,) multiplies the rows, in float32. Leave it out where the experts have applied the weights
            already.

    Returns:
        ``y_BlD``: (b, l, width), or (l, b, width), in the dtype of ``y_MD``; 0 for a token without experts. Sums are
        taken in float32 (float64 for float64): on the experts' rank, over ranks and, by a hierarchical plan, within
        the node before; each is rounded once.

    Raises:
        ValueError: a number of rows or weights that is not the plan's, or a dtype without sums (float8).
    """
    return start_combine(y_MD, metadata, weight_M).finish()


@uncompiled("each plan would be another graph; move rows outside of what is compiled")
def start_combine(y_MD: Tensor, metadata: Plan, weight_M: Tensor | None = None) -> PendingCombine:
    """:func:`combine` in the background, as :func:`start_dispatch`. By a hierarchical plan, the exchange between
    nodes is in the background.

    Args, Raises: as :func:`combine`.
    """
    _check_rows(y_MD, metadata, weight_M)
    if isinstance(metadata, HierarchicalPlan):
        y_1RD = combine(y_MD, metadata.within, weight_M)
        exchange = RowExchange(metadata.between)
        return PendingCombine(StartCombineBetween.apply(y_1RD.squeeze(0), exchange), exchange)  # type: ignore[arg-type]
    return _start_flat(y_MD, metadata, weight_M)


def _start_flat(y_MD: Tensor, metadata: DispatchMetadata, weight_M: Tensor | None) -> PendingCombine:
    exchange = RowExchange(metadata)
    if weight_M is None:
        return PendingCombine(StartCombine.apply(y_MD, exchange), exchange)  # type: ignore[arg-type]
    return PendingCombine(StartWeightedCombine.apply(y_MD, weight_M, exchange), exchange)  # type: ignore[arg-type]


def _check_rows(y_MD: Tensor, metadata: Plan, weight_M: Tensor | None) -> None:
    """ValueError unless there is a row, and a weight if there are weights, for each row of the plan."""
    if problem := problem_of_dtensors(y_MD=y_MD, weight_M=weight_M):
        raise ValueError(f"rank {metadata.rank}: {problem}")
    num_rows = metadata.num_rows
    if y_MD.ndim != 2 or y_MD.shape[0] != num_rows or not y_MD.is_floating_point():
        raise ValueError(
            f"rank {metadata.rank}: y is {tuple(y_MD.shape)} of {y_MD.dtype}, but the plan has {num_rows} rows; "
            "pass one floating-point row per row of dispatch, in its order"
        )
    if y_MD.dtype not in SUMMED:
        raise ValueError(
            f"rank {metadata.rank}: y is {y_MD.dtype}, in which there are no sums; pass it in torch.bfloat16 or a "
            "wider dtype, whatever the dtype of the rows of dispatch"
        )
    if weight_M is not None and tuple(weight_M.shape) != (num_rows,):
        raise ValueError(
            f"rank {metadata.rank}: weight_M is {tuple(weight_M.shape)}, but the plan has {num_rows} rows; pass "
            "the weight_M of dispatch"
        )
