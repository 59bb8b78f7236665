"""Results of rows that never ran, for the tests of what is built around them."""

from dataclasses import replace

from moe_dispatch.judge.results import QUANTITIES, Difference
from moe_dispatch.lab.validate.results import RowResult

DIFFERENCES = tuple(
    Difference(quantity=quantity, value=2e-16, tolerance=1e-10, where=where)
    for quantity, where in zip(QUANTITIES, ("token 5", "step 1", "blocks.0.weight", "step 2"), strict=True)
)

# (B, L) = (2, 3) on four ranks: rows cut over dp, positions over tp
AGREEING = RowResult(
    name="TP2",
    dtype="float64",
    mesh="dp 2, sp 1, tp 2, ep 4",
    shape=(2, 3),
    differences=DIFFERENCES,
    words=(),
    error="",
    losses=(5.5, 5.25),
    reference_losses=(5.5, 5.25),
    seconds=1.25,
    rank_of_token_BL=((0, 0, 1), (2, 2, 3)),
    rows_sent_PP=((1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12), (13, 14, 15, 16)),
    mutant_ran=True,
)


def differing(row: RowResult, quantity: str, value: float) -> RowResult:
    """``row`` with one quantity off by ``value``."""
    differences = tuple(
        replace(difference, value=value) if difference.quantity == quantity else difference
        for difference in row.differences
    )
    return replace(row, differences=differences)


def broken_off(row: RowResult, error: str) -> RowResult:
    """``row`` as a rank that raised leaves it."""
    nothing = {"differences": (), "losses": (), "reference_losses": (), "rank_of_token_BL": (), "rows_sent_PP": ()}
    return replace(row, error=error, **nothing)
