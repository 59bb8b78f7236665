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


def test_the_page_has_a_row_for_each_operation_and_no_other() -> None:
    page = PAGE.read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in rows] == [operation.name for operation in OPERATIONS]
    assert written(page, rows) == page
    assert all(head in page.splitlines() for head in HEAD)
