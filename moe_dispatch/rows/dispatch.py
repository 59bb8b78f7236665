"""Moving rows by a plan: float rows only, no arithmetic on indices.

Dispatch is a linear map A and combine is its adjoint, so the backward of each is the other, and neither keeps a row
for it (a combine with weights keeps the rows that the weights multiply, for the weights' gradient).

Each is two autograd Functions around an exchange in the background: one that gathers and starts it, one that waits
and spreads or sums. What runs between them overlaps with the exchange, and so does its backward with the exchange
backward: autograd runs backward in reverse order, so the second Function starts the exchange that the first awaits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..plan.counted import DispatchMetadata
from ..wire.exchange import Arrived, Transfer, start_exchange_into
from .buffer import Payload
from .sums import dot_rows, sum_rows, sum_weighted_rows, weigh_rows


@dataclass(slots=True, eq=False)
class Flight:
    """The rows of one dispatch or combine on their way, between its two Functions, in forward and in backward."""

    plan: DispatchMetadata
    _transfer: Transfer | Arrived | None = None

    def depart(self, payload: Payload, *tensors: Tensor) -> None:
        """Send rows of the tensors to the experts' ranks: one per (token, rank). This rank's own are gathered where
        they land, meanwhile."""
        plan, device, (away, own) = self.plan, tensors[0].device, self._away_and_own()
        token_of_away_S, token_of_own_S = plan.token_of_sent_S.split([away, own])
        away_SC, landing_RC = payload.empty(away, device), payload.empty(plan.num_received + plan.spare, device)
        payload.gather(token_of_away_S, tensors, out=away_SC)
        self._transfer = start_exchange_into(landing_RC, away_SC, plan.rows_away, plan.rows_from_others, plan.group)
        payload.gather(token_of_own_S, tensors, out=landing_RC[plan.num_received - own : plan.num_received])
        if plan.spare:
            landing_RC[plan.num_received :].zero_()

    def depart_home(self, rows_RC: Tensor) -> None:
        """Send rows back to their tokens' ranks."""
        plan, (away, own) = self.plan, self._away_and_own()
        rows_RC = rows_RC[: plan.num_received]
        if len(plan.rows_sent) == 1:
            self._transfer = Arrived(rows_RC)
            return
        from_RC, own_RC = rows_RC.split([plan.num_received - own, own])
        landing_SC = rows_RC.new_empty(away + own, rows_RC.shape[1])
        self._transfer = start_exchange_into(landing_SC, from_RC, plan.rows_from_others, plan.rows_away, plan.group)
        landing_SC[away:] = own_RC

    def _away_and_own(self) -> tuple[int, int]:
        """How many of the rows sent go to other ranks, and to this one."""
        own = self.plan.rows_sent[self.plan.rank]
        return sum(self.plan.rows_sent) - own, own

    def land(self) -> Tensor:
        """The rows that came; nothing of them stays here."""
        if self._transfer is None:
            raise RuntimeError(
                "these rows were taken already: finish() was called twice; call it once, and keep what it returns"
            )
        transfer, self._transfer = self._transfer, None
        return transfer.wait()


class _StartDispatch(torch.autograd.Function):
    """The half of A, and of its adjoint, on the tokens' rank. ``link`` is a number without meaning that ties the
    halves together in the graph.

    forward   send x_tD, weight_tK to the ranks that need them
    backward  d x_tD, d weight_tK = the sums of what came back
    """

    @staticmethod
    def forward(ctx: Any, x_tD: Tensor, weight_tK: Tensor, flight: Flight, payload: Payload) -> Tensor:
        ctx.flight, ctx.payload = flight, payload
        flight.depart(payload, x_tD, weight_tK)
        return x_tD.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        buffer_SC, plan = ctx.flight.land(), ctx.flight.plan
        grad_x_tD, grad_weight_tK = (
            ctx.payload.sum_part(buffer_SC, part, plan.sent_of_entry_S, plan.first_entry_t)[: plan.num_tokens]
            if needed
            else None
            for part, needed in enumerate(ctx.needs_input_grad[:2])
        )
        return grad_x_tD, grad_weight_tK, None, None


class _FinishDispatch(torch.autograd.Function):
    """The half on the experts' rank.

    forward   x_MD, weight_M = one copy of what came for each choice
    backward  send back the sums of d x_MD, and d weight_M in its token's row
    """

    @staticmethod
    def forward(ctx: Any, link: Tensor, flight: Flight, payload: Payload) -> tuple[Tensor, Tensor]:
        ctx.flight, ctx.payload, plan = flight, payload, flight.plan
        buffer_RC = flight.land()
        weight_M = payload.read_part(buffer_RC, 1)[plan.received_of_row_M, plan.choice_of_row_M]
        return payload.read_rows(buffer_RC, 0, plan.received_of_row_M), weight_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_x_MD, grad_weight_M), plan = grads, ctx.flight.plan
        grad_x_RD = sum_rows(grad_x_MD, plan.row_of_entry_M, plan.first_entry_R)[: plan.num_received]
        grad_weight_RK = grad_weight_M.new_zeros(plan.num_received + plan.spare, plan.expert_BlK.shape[2])
        grad_weight_RK[plan.received_of_row_M, plan.choice_of_row_M] = grad_weight_M
        ctx.flight.depart_home(ctx.payload.pack(grad_x_RD, grad_weight_RK[: plan.num_received]))
        return grad_x_MD.new_zeros(()), None, None


class _StartCombine(torch.autograd.Function):
    """The half of the adjoint of A on the experts' rank.

    forward   send back the sums of y_MD of each token
    backward  d y_MD = one copy of what came for each choice
    """

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, flight: Flight) -> Tensor:
        ctx.flight, ctx.dtype, plan = flight, y_MD.dtype, flight.plan
        flight.depart_home(sum_rows(y_MD, plan.row_of_entry_M, plan.first_entry_R))
        return y_MD.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_RD = ctx.flight.land().view(ctx.dtype)
        return grad_RD.index_select(0, ctx.flight.plan.received_of_row_M), None


class _StartWeightedCombine(torch.autograd.Function):
    """forward   send back the sums of weight_M * y_MD of each token
    backward  d y_MD = weight_M * g_MD and d weight_M = <y_MD, g_MD>, with g_MD one copy of what came for each choice
    """

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, weight_M: Tensor, flight: Flight) -> Tensor:
        ctx.flight, ctx.dtype, plan = flight, y_MD.dtype, flight.plan
        ctx.save_for_backward(y_MD if ctx.needs_input_grad[1] else None, weight_M)
        weight_of_entry_M = weight_M[plan.row_of_entry_M]
        flight.depart_home(sum_weighted_rows(y_MD, weight_of_entry_M, plan.row_of_entry_M, plan.first_entry_R))
        return y_MD.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y_MD, weight_M = ctx.saved_tensors
        received_of_row_M = ctx.flight.plan.received_of_row_M
        grad_RD = ctx.flight.land().view(ctx.dtype)
        grad_y_MD = grad_weight_M = None
        if ctx.needs_input_grad[0]:
            grad_y_MD = weigh_rows(grad_RD, weight_M, received_of_row_M)
        if ctx.needs_input_grad[1]:
            grad_weight_M = dot_rows(y_MD, grad_RD, received_of_row_M).to(weight_M.dtype)
        return grad_y_MD, grad_weight_M, None


class _FinishCombine(torch.autograd.Function):
    """The half on the tokens' rank.

    forward   y_tD = the sums over ranks of what came back
    backward  send d y_tD to the ranks that sent
    """

    @staticmethod
    def forward(ctx: Any, link: Tensor, flight: Flight) -> Tensor:
        ctx.flight, plan = flight, flight.plan
        # Not a view of anything: autograd lets nobody write to a view that a Function returns (y_BlD += x_BlD).
        return plan.checked(sum_rows(flight.land(), plan.sent_of_entry_S, plan.first_entry_t))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_y_tD,) = grads
        ctx.flight.depart(Payload(grad_y_tD), grad_y_tD)
        return grad_y_tD.new_zeros(()), None


@dataclass(frozen=True, slots=True, eq=False)
class PendingDispatch:
    """Rows on their way to the experts. Call :meth:`finish` once."""

    _link: Tensor
    _flight: Flight
    _payload: Payload

    def finish(self) -> tuple[Tensor, Tensor]:
        """Wait for the rows: what :func:`dispatch` returns. RuntimeError the second time."""
        return _FinishDispatch.apply(self._link, self._flight, self._payload)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, eq=False)
class PendingCombine:
    """Rows on their way back to their tokens. Call :meth:`finish` once."""

    _link: Tensor
    _flight: Flight

    def finish(self) -> Tensor:
        """Wait for the rows: what :func:`combine` returns. RuntimeError the second time."""
        y_tD: Tensor = _FinishCombine.apply(self._link, self._flight)  # type: ignore[assignment]
        return y_tD.unflatten(0, self._flight.plan.local_shape[:2])


def dispatch(x_BlD: Tensor, weight_BlK: Tensor, metadata: DispatchMetadata) -> tuple[Tensor, Tensor]:
    """Bring each token's row, with its routing weights, to the experts it chose. One collective; one more in
    backward.

    A token crosses to a rank once, however many of its experts live there, and is copied there.

    Args:
        x_BlD: ``metadata.local_shape``, this rank's tokens.
        weight_BlK: (b, l, K), or (l, b, K), the weight of each choice; its dtype may differ from that of ``x_BlD``.
        metadata: the plan of these tokens.

    Returns:
        ``x_MD`` (M, D) and ``weight_M`` (M,): one row per choice that fell on an expert of this rank, by expert, then
        global token, then choice; ``metadata.rows_per_expert_e`` says how many each expert got.

    The gradient of a token is the sum over its rows, taken in float32 (float64 for float64) and rounded to the rows'
    dtype once for the wire and once for the result.

    Raises:
        ValueError: a shape or dtype that does not fit the plan. Only this rank can see it, so it is raised here and
            not on its peers: pass ``weight_BlK`` to :func:`plan_dispatch`, and check the rest where all ranks take
            the same path.
    """
    return start_dispatch(x_BlD, weight_BlK, metadata).finish()


def start_dispatch(x_BlD: Tensor, weight_BlK: Tensor, metadata: DispatchMetadata) -> PendingDispatch:
    """:func:`dispatch` in the background: what is computed before ``finish()`` overlaps with the exchange, and its
    backward with the exchange backward. Every rank calls both, in the same order among its collectives.

    Args, Raises: as :func:`dispatch`.
    """
    check_tokens(x_BlD, weight_BlK, metadata, metadata.rank)
    x_tD, weight_tK = x_BlD.flatten(0, 1), weight_BlK.flatten(0, 1)
    flight, payload = Flight(metadata), Payload(x_tD, weight_tK)
    link: Tensor = _StartDispatch.apply(x_tD, weight_tK, flight, payload)  # type: ignore[assignment]
    return PendingDispatch(link, flight, payload)


def combine(y_MD: Tensor, metadata: DispatchMetadata, weight_M: Tensor | None = None) -> Tensor:
    """Sum each token's rows, where they were computed and then over ranks, back on the token's rank. One collective;
    one in backward.

    Args:
        y_MD: (M, any width), one result per row of :func:`dispatch`.
        metadata: the plan of that dispatch.
        weight_M: (M,) multiplies the rows, in float32. Leave it out where the experts have applied the weights
            already.

    Returns:
        ``y_BlD``: (b, l, width), or (l, b, width), in the dtype of ``y_MD``; 0 for a token without experts. Sums are
        taken in float32 (float64 for float64), and rounded once for the wire and once for the result.

    Raises:
        ValueError: a number of rows or weights that is not the plan's.
    """
    return start_combine(y_MD, metadata, weight_M).finish()


def start_combine(y_MD: Tensor, metadata: DispatchMetadata, weight_M: Tensor | None = None) -> PendingCombine:
    """:func:`combine` in the background, as :func:`start_dispatch`.

    Args, Raises: as :func:`combine`.
    """
    num_rows = len(metadata.token_of_row_M)
    if y_MD.ndim != 2 or len(y_MD) != num_rows or not y_MD.is_floating_point():
        raise ValueError(
            f"rank {metadata.rank}: y is {tuple(y_MD.shape)} of {y_MD.dtype}, but the plan has {num_rows} rows; "
            "pass one floating-point row per row of dispatch, in its order"
        )
    flight = Flight(metadata)
    if weight_M is None:
        return PendingCombine(_StartCombine.apply(y_MD, flight), flight)  # type: ignore[arg-type]
    if tuple(weight_M.shape) != (num_rows,):
        raise ValueError(
            f"rank {metadata.rank}: weight_M is {tuple(weight_M.shape)}, but the plan has {num_rows} rows; pass "
            "the weight_M of dispatch"
        )
    return PendingCombine(_StartWeightedCombine.apply(y_MD, weight_M, flight), flight)  # type: ignore[arg-type]


def check_tokens(x_BlD: Tensor, weight_BlK: Tensor, metadata: DispatchMetadata, rank: int) -> None:
    """ValueError unless tokens and weights are those that the plan was made for. ``rank``: as it is told."""
    if tuple(x_BlD.shape) != metadata.local_shape or not x_BlD.is_floating_point():
        raise ValueError(
            f"rank {rank}: x is {tuple(x_BlD.shape)} of {x_BlD.dtype}, but the plan was made for "
            f"{metadata.local_shape}; pass the floating-point tokens that the plan's expert ids belong to"
        )
    if weight_BlK.shape != metadata.expert_BlK.shape or not weight_BlK.is_floating_point():
        raise ValueError(
            f"rank {rank}: weights are {tuple(weight_BlK.shape)} of {weight_BlK.dtype}, but the plan was "
            f"made from ids of shape {tuple(metadata.expert_BlK.shape)}; each choice needs one floating-point weight"
        )
