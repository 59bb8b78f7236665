"""The table of docs/device.md. ``python -m tests.support.cuda.tried.table`` writes it."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from moe_dispatch.testing import RankThreads

from ..report import Report
from .checked import check
from .operation import Operation
from .operations import OPERATIONS, RANKS

PAGE = Path(__file__).parents[4] / "docs/device.md"
HEAD = (
    "| Operation | kernels | D2H | H2D | collectives | backward: kernels | D2H | H2D | collectives |",
    "|---|---|---|---|---|---|---|---|---|",
)


def row(operation: Operation, reports: Sequence[Report]) -> str:
    """The most that a rank does, forward and backward, which alternate in ``reports``."""
    ways = (reports[::2], reports[1::2])
    numbers = [max(column) for way in ways for column in zip(*(report.row for report in way), strict=True)]
    return f"| `{operation.name}` | {' | '.join(map(str, numbers))} |"


def written(page: str, rows: Iterable[str]) -> str:
    """The page with these rows in place of those it has."""
    head = "\n".join(HEAD)
    before, _, after = page.partition(head)
    others = [line for line in after.splitlines() if not line.startswith("| `")]
    return "\n".join((before + head, *rows, *others[1:], ""))


if __name__ == "__main__":
    with RankThreads() as threads:
        PAGE.write_text(written(PAGE.read_text(), [row(each, check(each, RANKS, threads)) for each in OPERATIONS]))
