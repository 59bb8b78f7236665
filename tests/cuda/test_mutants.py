"""Seven mistakes that only a device shows, put into the library on purpose: each has to be caught."""

import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_dispatch import agree, dispatch
from moe_dispatch.layer.balance import sum_counts
from moe_dispatch.rows import functions
from moe_dispatch.rows.row_exchange import RowExchange
from moe_dispatch.testing import RankThreads
from moe_dispatch.wire import exchange
from tests.support.cuda.device import FakeGpu
from tests.support.cuda.ranks import results_on_cuda
from tests.support.cuda.tried.checked import check
from tests.support.cuda.tried.of_experts import counted, drawn, moving, static
from tests.support.cuda.tried.operation import Operation, Pass, Place, Step, run_step
from tests.support.cuda.tried.operations import RANKS
from tests.support.ranks import world


def dispatching(rank: int, place: Place) -> Step:
    """By a plan of fixed sizes: rows of zeros follow those of the experts."""
    ids, weight, x = map(place.tensor, drawn(rank))
    plan = static(rank)(ids, weight)
    return Step(lambda: dispatch(x, weight, plan), (x, weight))


def two_collectives(first: int, rank: int, place: Place) -> Step:
    """A sum and an exchange, in another order on rank ``first``; no rank if that is -1."""

    def forward() -> Sequence[Tensor]:
        count = torch.ones(3, device=place.device)
        calls = [
            partial(sum_counts, count, world()),
            partial(agree, "the same", device=place.device, group=world()),
        ]
        for call in reversed(calls) if rank == first else calls:
            call()
        return [count]

    return Step(forward)


ROWS = Operation(name="rows", step=partial(moving, counted, False, torch.bfloat16))
FIXED = Operation(name="fixed sizes", step=dispatching)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One line of a function, changed.

    Attributes:
        where, name: the function.
        line, by: what it has, and what it has instead.
        operation: in which it shows.
        caught: what is said of it.
    """

    where: Any
    name: str
    line: str
    by: str
    operation: Operation
    caught: str

    def function(self) -> Callable[..., Any]:
        raw = inspect.getattr_static(self.where, self.name)
        function = inspect.unwrap(raw.__func__ if isinstance(raw, staticmethod) else raw)
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.line) == 1, f"{self.name} has changed: {self.line!r} is not in it once"
        names: dict[str, Any] = {}
        exec(source.replace(self.line, self.by), function.__globals__, names)
        return names[self.name]


MUTANTS = {
    "rows are read before they came": Mutant(
        where=RowExchange,
        name="wait",
        line="return pending.wait()",
        by="return pending.out if hasattr(pending, 'out') else pending.wait()",
        operation=ROWS,
        caught="memory was freed before wait",  # of what nobody waits for, nobody keeps anything
    ),
    "rows that are sent are not kept": Mutant(
        where=exchange,
        name="start_exchange_into",
        line="PendingExchange(rows, out, work)",
        by="PendingExchange(out, out, work)",
        operation=ROWS,
        caught="memory was freed before wait",
    ),
    "a value is read in a layer": Mutant(
        where=functions,
        name="sum_rows",
        line="return F.",
        by="first_entry.sum().item(); return F.",
        operation=ROWS,
        caught="rank 0 waits at Counter",
    ),
    "an index on the CPU": Mutant(
        where=functions.FinishDispatch,
        name="forward",
        line="buffer_RC, plan.received_of_row_M",
        by="buffer_RC, plan.received_of_row_M.cpu()",
        operation=ROWS,
        caught="on the same device, but found cuda:0 and cpu",
    ),
    "a spare row that nobody wrote": Mutant(
        where=RowExchange,
        name="start",
        line=".zero_()",
        by=".shape",
        operation=FIXED,
        caught="rank 0, tensor 0",
    ),
    "a number of the host in a layer": Mutant(
        where=functions,
        name="weigh_rows",
        line="return ",
        by="return torch.tensor(1.0, device=rows_RD.device) * ",
        operation=Operation(name="weighted", step=partial(moving, counted, True, torch.bfloat16)),
        caught="copies",
    ),
}


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize(
    "operation",
    {each.operation.name: each.operation for each in MUTANTS.values()}.values(),
    ids=lambda each: each.name,
)
def test_the_library_itself_passes(operation: Operation, rank_threads: RankThreads) -> None:
    check(operation, RANKS, rank_threads)


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_is_caught(mutant: Mutant, rank_threads: RankThreads) -> None:
    with (
        mock.patch.object(mutant.where, mutant.name, mutant.function()),
        pytest.raises((AssertionError, RuntimeError), match=mutant.caught),
    ):
        check(mutant.operation, RANKS, rank_threads)


def test_another_order_of_collectives_on_one_rank_is_caught() -> None:
    """On the CPU, too: the ranks that are threads see it."""

    def case(first: int) -> Callable[[int, FakeGpu], Pass]:
        return lambda rank, gpu: run_step(two_collectives(first, rank, gpu), gpu, (1, 0))

    results_on_cuda(case(-1), RANKS)
    with pytest.raises(RuntimeError, match="the ranks of a group are in different collectives"):
        results_on_cuda(case(1), RANKS)
