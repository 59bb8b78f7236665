"""What one comparison runs on: how many ranks of each kind, and which data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A mesh, and the data that it trains on.

    Attributes:
        batch: B, of the whole.
        seq: L, of the whole.
        dp: data-parallel ranks.
        sp: sequence-parallel ranks.
        tp: tensor-parallel ranks.
        ep: expert-parallel ranks, as ``build_mesh`` takes all of them.
        lengths: of the sequence on each "sp" rank; none where they are balanced.
        documents: (real tokens, places) of each, packed end to end, row after row; none where each row is one.
        left_padding: how many tokens at the start of each row are padding; none where no token is.
        window: how many keys back a query sees, -1 for all.

    A subject may have no use for ``lengths``, ``documents``, ``left_padding`` and ``window``.
    """

    batch: int
    seq: int
    dp: int = 1
    sp: int = 1
    tp: int = 1
    ep: int = 1
    lengths: tuple[int, ...] = ()
    documents: tuple[tuple[int, int], ...] = ()
    left_padding: tuple[int, ...] = ()
    window: int = -1

    @property
    def ranks(self) -> int:
        return self.dp * self.sp * self.tp

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return self.batch, self.seq

    @property
    def mesh(self) -> str:
        return f"dp {self.dp}, sp {self.sp}, tp {self.tp}, ep {self.ep}"

    @property
    def data(self) -> tuple[int, int, tuple[tuple[int, int], ...], tuple[int, ...], int]:
        """What one process needs to know. Layouts with the same have the same reference."""
        return self.batch, self.seq, self.documents, self.left_padding, self.window
