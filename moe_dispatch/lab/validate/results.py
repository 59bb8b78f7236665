"""What one row of the matrix found."""

from dataclasses import dataclass

from ...judge.results import Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """One row of the matrix in one dtype.

    Attributes:
        name, dtype, mesh: what ran, e.g. "FSDP2 + TP2 + EP4", "float64", "dp 2, sp 1, tp 2, ep 4".
        shape: (B, L), global.
        differences: one per quantity, in the order of QUANTITIES; empty where the row did not run to its end.
        words: what is wrong, where the numbers tell.
        error: why it did not: the exception's text; empty where it did.
        losses, reference_losses: the loss of each step, here and in one process.
        seconds: how long it took.
        rank_of_token_BL: which rank holds which token.
        rows_sent_PP: rows that each rank sent to each rank by its first plan; 0 where none was made.
        mutant_ran: whether a known bug was put in, and any rank ran it.
    """

    name: str
    dtype: str
    mesh: str
    shape: tuple[int, int]
    differences: tuple[Difference, ...]
    words: tuple[str, ...]
    error: str
    losses: tuple[float, ...]
    reference_losses: tuple[float, ...]
    seconds: float
    rank_of_token_BL: tuple[tuple[int, ...], ...]
    rows_sent_PP: tuple[tuple[int, ...], ...]
    mutant_ran: bool

    @property
    def disagreeing(self) -> tuple[str, ...]:
        """The quantities that differ; ("error",) where the row did not run to its end."""
        if self.error:
            return ("error",)
        return tuple(difference.quantity for difference in self.differences if not difference.agrees)

    @property
    def agrees(self) -> bool:
        return not self.disagreeing
