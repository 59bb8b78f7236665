"""What the plans of fixed sizes tell after the fact, the same on every rank: numbers on the device until asked for.

One number per rank: 0, DIFFERS where its word is another than that of the first rank without a problem, or WRONG.
Then the most rows that any rank had for any rank, and the most that any rank's experts got. The report of several
plans is the maximum of theirs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import StaticSizesError
from ..wire.agreement import BAD

DIFFERS, WRONG = 1, 2


def report_size(ranks: int) -> int:
    """How many numbers a report has."""
    return ranks + 2


def report_of(word_P: Tensor, needed_2: Tensor) -> Tensor:
    """(ranks + 2,) the report of one plan.

    Args:
        word_P: the words of all ranks.
        needed_2: rows of the fullest pair, and of the fullest rank.
    """
    is_bad_P = word_P == BAD
    first_good_1 = is_bad_P.to(torch.int64).argmin(0, keepdim=True)
    differs_P = (word_P != word_P.index_select(0, first_good_1)).to(torch.int64) * DIFFERS
    return torch.cat([differs_P.masked_fill_(is_bad_P, WRONG), needed_2])


def told(report: Sequence[int], *, rows_per_pair: int, rows: int) -> None:
    """Raise StaticSizesError if the report tells of a problem."""
    *of_ranks, of_pair, of_rank = report
    problems = [
        f"rank {rank} has expert ids out of range or NaN weights"
        for rank, kind in enumerate(of_ranks)
        if kind == WRONG
    ]
    differing = [rank for rank, kind in enumerate(of_ranks) if kind == DIFFERS]
    if differing:
        others = [rank for rank, kind in enumerate(of_ranks) if kind == 0][:1]
        ranks = " and ".join(map(str, sorted([*others, *differing])))
        problems.append(f"ranks {ranks} disagree about K, dim, dtype, sizes, sharding or experts")
    if of_pair > rows_per_pair:
        problems.append(
            f"{of_pair} tokens of one rank go to one rank, but rows_per_pair is {rows_per_pair}; plan with more (the "
            "tokens of the largest shard are always enough)"
        )
    if of_rank > rows:
        problems.append(f"{of_rank} choices fall on the experts of one rank, but rows is {rows}; plan with more")
    if problems:
        raise StaticSizesError("a plan of fixed sizes did not hold, and its outputs are NaN: " + "; ".join(problems))
