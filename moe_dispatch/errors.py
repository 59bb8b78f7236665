"""The errors that every rank of a group raises alike.

    ValueError
    └── GroupError              the same text on every rank; the group stays usable
        ├── RankMistakeError    something is wrong on one rank or several; the text names them
        ├── DisagreementError   nothing is wrong on any rank, but they do not mean the same call
        └── StaticSizesError    a plan of fixed sizes was too small

What every rank sees by itself, before anything is sent, is a plain ValueError.
"""


class GroupError(ValueError):
    """Raised on every rank of a group, with the same text."""


class RankMistakeError(GroupError):
    """Something is wrong on one rank or several.

    Attributes:
        ranks: those ranks, as the group that told it numbers them; by a hierarchical plan, that of the node.
    """

    def __init__(self, text: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(text)
        self.ranks = ranks


class DisagreementError(GroupError):
    """The ranks do not mean the same call."""


class StaticSizesError(GroupError):
    """More rows than a plan of fixed sizes has room for, or a call in which one rank had a problem."""
