"""Every public operation on a device that is not there, forward and backward, at both extremes of an exchange."""

import pytest

from moe_dispatch.testing import RankThreads
from tests.support.cuda.tried.checked import check
from tests.support.cuda.tried.operation import Operation
from tests.support.cuda.tried.operations import OPERATIONS, RANKS
from tests.support.cuda.tried.table import HEAD, PAGE, row, written


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.usefixtures("uncovered")
def test_an_operation_is_right_and_does_what_the_page_says(operation: Operation, rank_threads: RankThreads) -> None:
    """Where a number has changed on purpose: ``python -m tests.support.cuda.tried.table`` writes the page."""
    found = row(operation, check(operation, RANKS, rank_threads))
    if found not in PAGE.read_text().splitlines():
        pytest.fail(f"docs/device.md has another row: {found}")


# Kernels of a layer's own operations, forward and backward: each is at least a launch, some 5 us of the host.
MOST_KERNELS = {
    "plan_dispatch": (40, 0),
    "plan_dispatch by counts": (40, 0),
    "dispatch, combine by plan_dispatch": (16, 24),
}


@pytest.mark.parametrize("name", MOST_KERNELS)
def test_a_layer_launches_no_more_kernels_than_this(name: str) -> None:
    (cells,) = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert int(cells[1]) <= MOST_KERNELS[name][0]
    assert int(cells[5]) <= MOST_KERNELS[name][1]


def test_the_page_has_a_row_for_each_operation_and_no_other() -> None:
    page = PAGE.read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in rows] == [operation.name for operation in OPERATIONS]
    assert written(page, rows) == page
    assert all(head in page.splitlines() for head in HEAD)
