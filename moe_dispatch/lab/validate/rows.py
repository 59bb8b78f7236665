"""The rows of a matrix, as the loops and tables know them."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

from ...judge.layout import Layout
from ...judge.subject import Subject
from .config.spreading import Spreading


class Source(Hashable, Protocol):
    """Where a subject comes from: every process makes its own. Equal sources make subjects that are equal in one
    process."""

    @property
    def is_users(self) -> bool:
        """Whether what it raises is the user's, not ours."""
        ...

    @property
    def told(self) -> str:
        """What it is, in a few words; others where the subject is another."""
        ...

    def load(self) -> Subject: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: a subject in one layout.

    Attributes:
        name: of the row.
        one_head: whether its attention has no second head, as far as is known.
        spreading: of its attention over "sp", as far as is known.
        special: how its data or model are unlike those of other rows of its shape, in words; mostly empty.
    """

    name: str
    source: Source
    layout: Layout
    one_head: bool
    spreading: Spreading
    special: str

    @property
    def data(self) -> Hashable:
        """What one process needs to know of the row: rows with the same have the same reference."""
        return self.source, self.layout.data
