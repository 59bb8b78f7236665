"""What one comparison runs on: how many ranks of each kind, and which data."""

from dataclasses import dataclass

from .. import Partition, TokenSharding

CONTIGUOUS, ZIGZAG, STRIPED = ORDERS = ("contiguous", "zigzag", "striped")


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
        order: of tokens over "sp": "contiguous"; "zigzag", of twice as many pieces as ranks, a late one for each
            early one; or "striped", pieces dealt to the ranks in turn. :attr:`sharding` has it.
        stripe: places of a piece in order "striped".
        documents: (real tokens, places) of each, packed end to end, row after row; none where each row is one.
        left_padding: how many tokens at the start of each row are padding; none where no token is.
        window: how many keys back a query sees, -1 for all.

    A subject may have no use for ``lengths``, ``order``, ``documents``, ``left_padding`` and ``window``.
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
    order: str = CONTIGUOUS
    stripe: int = 1

    @property
    def sharding(self) -> TokenSharding:
        """Whole rows over the ranks of "sp", in ``lengths`` or in ``order``, as ``Parallel.shard`` takes it.

        Raises:
            ValueError: an order that there is not, or one beside lengths.
        """
        if self.order not in ORDERS:
            raise ValueError(f"order is {self.order!r}; it has to be one of {', '.join(map(repr, ORDERS))}")
        if self.lengths and self.order != CONTIGUOUS:
            raise ValueError(
                f"lengths are {self.lengths} and the order is {self.order!r}, which has lengths of its own; leave "
                "out one of them"
            )
        if self.order == ZIGZAG:
            return TokenSharding.zigzag(batch=self.batch, length=self.seq, ranks=self.sp)
        if self.order == STRIPED:
            return TokenSharding.striped(batch=self.batch, length=self.seq, ranks=self.sp, stripe=self.stripe)
        seq = Partition(self.lengths) if self.lengths else Partition.balanced(self.seq, self.sp)
        return TokenSharding(batch=self.batch, seq=seq)

    @property
    def places_in_order(self) -> int:
        """How many places at the start of each row are where contiguous shards of the same lengths have them."""
        in_order = 0
        for rank in range(self.sp):
            for start, stop in self.sharding.runs(rank):
                if start < stop and start != in_order:
                    return in_order
                in_order += stop - start
        return in_order

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
