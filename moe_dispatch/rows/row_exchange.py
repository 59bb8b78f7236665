"""The rows of one dispatch or combine on their way: gathered into a buffer, exchanged in the background, awaited."""

from dataclasses import dataclass

from torch import Tensor

from ..plan.metadata import DispatchMetadata
from ..wire.callers import check_memory
from ..wire.exchange import FinishedExchange, PendingExchange, start_exchange_into
from .buffer import RowFormat


@dataclass(slots=True, eq=False)
class RowExchange:
    """The rows of one dispatch or combine on their way, between its two Functions, in forward and in backward."""

    plan: DispatchMetadata
    _pending: PendingExchange | FinishedExchange | None = None

    def start(self, row_format: RowFormat, *tensors: Tensor) -> None:
        """Send rows of the tensors to the experts' ranks: one per (token, rank). This rank's own are gathered where
        they land, meanwhile."""
        check_memory(*tensors)
        plan, device, (away, own) = self.plan, tensors[0].device, self._away_and_own()
        token_of_away_S, token_of_own_S = plan.token_of_sent_S.split_with_sizes([away, own])
        away_SC, received_RC = (
            row_format.empty(away, device),
            row_format.empty(plan.num_received + plan.spare, device),
        )
        row_format.gather(token_of_away_S, tensors, out=away_SC)
        self._pending = start_exchange_into(received_RC, away_SC, plan.rows_away, plan.rows_from_others, plan.group)
        row_format.gather(token_of_own_S, tensors, out=received_RC[plan.num_received - own : plan.num_received])
        if plan.spare:
            received_RC[plan.num_received :].zero_()

    def start_home(self, rows_RC: Tensor) -> None:
        """Send rows back to their tokens' ranks."""
        plan, (away, own) = self.plan, self._away_and_own()
        rows_RC = rows_RC[: plan.num_received]
        if len(plan.rows_sent) == 1:
            self._pending = FinishedExchange(rows_RC)
            return
        from_RC, own_RC = rows_RC.split_with_sizes([plan.num_received - own, own])
        received_SC = rows_RC.new_empty(away + own, rows_RC.shape[1])
        self._pending = start_exchange_into(received_SC, from_RC, plan.rows_from_others, plan.rows_away, plan.group)
        received_SC[away:] = own_RC

    def _away_and_own(self) -> tuple[int, int]:
        """How many of the rows sent go to other ranks, and to this one."""
        own = self.plan.rows_sent[self.plan.rank]
        return sum(self.plan.rows_sent) - own, own

    def wait(self) -> Tensor:
        """The rows that came; nothing of them stays here."""
        if self._pending is None:
            raise RuntimeError(
                "these rows were taken already: finish() was called twice; call it once, and keep what it returns"
            )
        pending, self._pending = self._pending, None
        return pending.wait()
