"""Which parts of tensors each rank gets, or gives, in ints; and ranks in a row that are served by one copy.

A part is a *box*: consecutive tokens, and of them consecutive heads. Where the boxes of neighbours are equally large
and lie side by side, one strided view holds those of all of them. So what is launched does not grow with the ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Box(NamedTuple):
    """So many tokens from a first one on, and of them so many heads."""

    token: int
    tokens: int
    head: int
    heads: int


class Next(Enum):
    """Where the box of the next rank is: in the same place, behind by its tokens, or by its heads."""

    SAME = "same"
    TOKENS = "tokens"
    HEADS = "heads"


Boxes = Sequence[Box]
Steps = Sequence[Next]
Joins = Callable[[Boxes, Boxes], Steps | None]  # of two ranks, the latter seen from the former


class RankRun(NamedTuple):
    """Ranks in a row that are served at once.

    Attributes:
        ranks: how many.
        boxes: of the first of them, of each tensor.
        steps: of each of these boxes.
    """

    ranks: int
    boxes: Sequence[Boxes]
    steps: Sequence[Steps]


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What each rank gets, or gives, of some tensors.

    Attributes:
        token_dims: of each tensor: 1 of (B, l, N, H), 0 of (l, B, N, H).
        own: the boxes of this rank, of each tensor.
        runs: all other ranks, in their order.
        places: of each tensor and each rank, how many pairs of a token and a head; 0 of this rank.
    """

    token_dims: Sequence[int]
    own: Sequence[Boxes]
    runs: Sequence[RankRun]
    places: Sequence[Sequence[int]]

    @classmethod
    def of(cls, rank: int, token_dims: Sequence[int], boxes: Sequence[Sequence[Boxes]], joins: Joins) -> "Parts":
        """For this rank.

        Args:
            boxes: of each tensor, of each rank, in the order in which they travel.
            joins: how the boxes of neighbours may be served at once: :func:`to_read`, :func:`to_fill` or
                :func:`to_add`.
        """
        places = [
            [sum([box.tokens * box.heads for box in of_rank]) if r != rank else 0 for r, of_rank in enumerate(x)]
            for x in boxes
        ]
        runs: list[RankRun] = []
        for r in range(len(boxes[0]) if boxes else 0):
            if r == rank:
                continue
            steps = _joined(r, boxes, joins) if runs and r - 1 != rank else None
            if steps is not None and (runs[-1].ranks == 1 or runs[-1].steps == steps):
                runs[-1] = RankRun(runs[-1].ranks + 1, runs[-1].boxes, steps)
            else:
                runs.append(RankRun(1, [x[r] for x in boxes], [[Next.SAME] * len(x[r]) for x in boxes]))
        return cls(token_dims, [x[rank] for x in boxes], runs, places)


def _joined(r: int, boxes: Sequence[Sequence[Boxes]], joins: Joins) -> list[Steps] | None:
    found: list[Steps] = []
    for x in boxes:
        steps = joins(x[r - 1], x[r])
        if steps is None:
            return None
        found.append(steps)
    return found


def to_read(before: Boxes, after: Boxes) -> Steps | None:
    """Of boxes that are read: neighbours may have the same."""
    if len(before) != len(after):
        return None
    steps: list[Next] = []
    for a, b in zip(before, after, strict=True):
        if a.tokens != b.tokens or a.heads != b.heads:
            return None
        if not a.tokens or not a.heads or (a.token == b.token and a.head == b.head):
            steps.append(Next.SAME)
        elif a.token == b.token and a.head + a.heads == b.head:
            steps.append(Next.HEADS)
        elif a.head == b.head and a.token + a.tokens == b.token:
            steps.append(Next.TOKENS)
        else:
            return None
    return steps


def to_fill(before: Boxes, after: Boxes) -> Steps | None:
    """Of boxes that are written to: no element twice in one copy."""
    steps = to_read(before, after)
    if steps is None:
        return None
    for a, step in zip(before, steps, strict=True):
        if step is Next.SAME and a.tokens and a.heads:
            return None
    return steps


def to_add(before: Boxes, after: Boxes) -> Steps | None:
    """Of boxes that are added to, which may overlap those of other ranks: each element gets its terms in the order of
    the ranks. The first boxes of all ranks of a run are added before their second ones, so where there are several,
    ranks have to be apart by their heads."""
    steps = to_fill(before, after)
    if steps is None or (len(steps) > 1 and Next.TOKENS in steps):
        return None
    return steps
