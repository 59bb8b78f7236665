"""Which rows and pieces of the grid each rank holds: the value that a :class:`TokenSharding` is. No tokens yet."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import accumulate, chain
from typing import Any, Literal, Self, TypeVar

from torch import Tensor

from . import orders
from .frozen import Frozen
from .on_device import Made
from .partition import Partition, check_count
from .places import Places, Run, as_held, in_order

T = TypeVar("T")


class HeldGrid(Frozen):
    """See :class:`TokenSharding`."""

    batch: Partition
    seq: Partition
    order: Literal["BL", "LB"]
    held: tuple[tuple[int, ...], ...]
    rectangles: tuple[int, ...]
    places: Places
    num_ranks: int
    num_tokens: int
    global_shape: tuple[int, int]
    local_sizes: tuple[int, ...]
    local_starts: tuple[int, ...]
    num_held: int
    _pieces: tuple[tuple[int, int], ...]
    _kept: dict[Hashable, Made]

    __slots__ = tuple(__annotations__)
    _defining = ("batch", "seq", "order", "held", "rectangles")

    def __init__(
        self,
        *,
        batch: Partition | int,
        seq: Partition | int,
        order: Literal["BL", "LB"] = "BL",
        held: Iterable[Iterable[int]] | None = None,
    ) -> None:
        if order not in ("BL", "LB"):
            raise ValueError(
                f'order is {order!r}; use "BL" for (batch, seq, ...) tensors or "LB" for (seq, batch, ...)'
            )
        for name, cut in (("batch", batch), ("seq", seq)):
            if not isinstance(cut, Partition):
                check_count(cut, f"{name} (a Partition, or an int where it is not cut)", least=0)
                cut = Partition((cut,))
            object.__setattr__(self, name, cut)
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "held", in_order(self.seq) if held is None else as_held(held))
        object.__setattr__(self, "places", Places(self.seq, self.held))
        self._hold(tuple(range(len(self.batch) * len(self.held))))

    def _hold(self, rectangles: tuple[int, ...]) -> None:
        """Store which rank holds which rectangle, and what follows: asked for in every call, so never recomputed."""
        rows, length = self.batch.total, self.seq.total
        width = len(self.held)
        pieces = tuple((i // width, i % width) for i in rectangles)
        local_sizes = tuple(self.batch.sizes[i] * self.places.lengths.sizes[j] for i, j in pieces)
        for name, value in (
            ("rectangles", rectangles),
            ("num_ranks", len(rectangles)),
            ("num_tokens", rows * length),
            ("global_shape", (rows, length) if self.order == "BL" else (length, rows)),
            ("local_sizes", local_sizes),
            ("local_starts", tuple(accumulate(local_sizes[:-1], initial=0))),
            ("num_held", sum(local_sizes)),
            ("_pieces", pieces),
            ("_kept", {}),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def _of(cls, *value: Any) -> Self:
        batch, seq, order, held, rectangles = value
        sharding = cls(batch=batch, seq=seq, order=order, held=held)
        sharding._hold(rectangles)
        return sharding

    @classmethod
    def zigzag(cls, *, batch: Partition | int, length: int, ranks: int, order: Literal["BL", "LB"] = "BL") -> Self:
        """2 * ``ranks`` pieces of a sequence, of which rank r holds r and 2 * ``ranks`` - 1 - r: under a causal mask
        each has as much to do. Pieces differ by at most one place. ValueError for numbers that cannot be."""
        seq, held = orders.zigzag(length, ranks)
        return cls(batch=batch, seq=seq, order=order, held=held)

    @classmethod
    def striped(
        cls, *, batch: Partition | int, length: int, ranks: int, stripe: int, order: Literal["BL", "LB"] = "BL"
    ) -> Self:
        """Pieces of ``stripe`` places, the last one short, dealt to ``ranks`` in turn. Attention copies each piece by
        itself, so stripes of fewer than about 16 places are slow. ValueError for numbers that cannot be."""
        seq, held = orders.striped(length, ranks, stripe)
        return cls(batch=batch, seq=seq, order=order, held=held)

    @classmethod
    def of_runs(
        cls,
        *,
        batch: Partition | int,
        length: int,
        runs: Sequence[Sequence[Run]],
        order: Literal["BL", "LB"] = "BL",
    ) -> Self:
        """Any order: for each rank of the sequence a list of runs (start, stop), in the order of its tensor; none for
        a rank without places. ValueError unless each of the ``length`` places is in one of them."""
        seq, held = orders.of_runs(length, runs)
        return cls(batch=batch, seq=seq, order=order, held=held)

    def __repr__(self) -> str:
        """Contiguous shards do not tell ``held``, which is as long as ``seq`` and says nothing."""
        names = [name for name in self._defining if name != "held" or self.held != in_order(self.seq)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gives, made once for each ``key`` and kept for as long as this object lives: for tensors that
        depend on the sharding and the key only, and that nobody writes to. The key of tensors names their device."""
        if key not in self._kept:
            self._kept[key] = Made(make(), key)
        return self._kept[key].take()

    def local_shape(self, rank: int) -> tuple[int, int]:
        """(b, l), or (l, b) for order "LB"."""
        rows, length = self.extent(rank)
        return (rows, length) if self.order == "BL" else (length, rows)

    def with_batch(self, batch: Partition | int) -> Self:
        """The same places of each rank, for other rows. Where those are cut, each piece of them has ranks of its own,
        as many as there are here. ValueError if the rows of this sharding are cut."""
        if len(self.batch) != 1:
            raise ValueError(f"the batch is cut into {self.batch.sizes}; with_batch needs a sharding of uncut rows")
        cut = Partition((batch,)) if isinstance(batch, int) else batch
        rectangles = tuple(i * len(self.held) + j for i in range(len(cut)) for _, j in self._pieces)
        return self._of(cut, self.seq, self.order, self.held, rectangles)

    def cut(self, ranks: int) -> Self:
        """Each rank's places, in the order of its tensor, over ``ranks`` ranks as evenly as can be: rank r of this
        sharding becomes ``r * ranks`` to ``(r + 1) * ranks - 1``, e.g. the tensor-parallel ranks of a sequence rank.
        ValueError for no ranks."""
        parts = (
            orders.cut_runs(runs, Partition.balanced(length, ranks).sizes)
            for runs, length in zip(self.places.runs, self.places.lengths.sizes, strict=True)
        )
        seq, held = orders.of_runs(self.seq.total, list(chain(*parts)))
        rectangles = tuple(i * ranks + part for i in self.rectangles for part in range(ranks))
        return self._of(self.batch, seq, self.order, held, rectangles)

    def select(self, ranks: Sequence[int]) -> Self:
        """The same grid as held by a group of only these ranks, in this order, e.g. an EP group that is part of the
        mesh.

        Tokens keep their global ids. :meth:`locate` gives rank -1 for a token that none of these ranks holds.
        ValueError for no ranks, a rank twice, or one that there is not.
        """
        ranks = tuple(ranks)
        for rank in ranks:
            self._piece(rank)
        if not ranks or len(set(ranks)) != len(ranks):
            raise ValueError(f"ranks {ranks} selected; name at least one rank, and each once")
        return self._holding(tuple(self.rectangles[rank] for rank in ranks))

    def _holding(self, rectangles: tuple[int, ...]) -> Self:
        """The same grid in other hands. What belongs to the grid is not made anew: there may be a thousand ranks."""
        sharding = type(self).__new__(type(self))
        for name in ("batch", "seq", "order", "held", "places"):
            object.__setattr__(sharding, name, getattr(self, name))
        sharding._hold(rectangles)
        return sharding

    def check_local(self, x: Tensor, rank: int) -> None:
        """Raise ValueError unless ``x`` has the shape (b, l, ...) or (l, b, ...) that ``rank`` holds."""
        if tuple(x.shape[:2]) != self.local_shape(rank):
            raise ValueError(
                f"rank {rank} has a tensor of shape {tuple(x.shape)}, but its shard in order {self.order!r} is "
                f"{self.local_shape(rank)}; pass this rank's tokens, as sharding.shard(x, {rank}) cuts them"
            )

    def check_whole(self, what: str) -> None:
        """Raise ValueError if some token of the grid is held by none of the ranks."""
        if self.num_held != self.num_tokens:
            raise ValueError(
                f"{what} needs every token of the grid, but the ranks of this sharding hold {self.num_held} "
                f"of {self.num_tokens}; describe the tokens that this group holds, not a selection of a larger mesh"
            )

    def extent(self, rank: int) -> tuple[int, int]:
        """(rows, positions) that the rank holds, for either order."""
        i, j = self._piece(rank)
        return self.batch.sizes[i], self.places.lengths.sizes[j]

    def first(self, rank: int) -> tuple[int, int]:
        """The rank's first row, and where its places start in the stacked sequence: what the ranks of the sequence
        hold, rank after rank."""
        i, j = self._piece(rank)
        return self.batch.offsets[i], self.places.lengths.offsets[j]

    def runs(self, rank: int) -> tuple[Run, ...]:
        """(start, stop) of the consecutive positions that the rank holds, in the order of its tensor; one run, which
        is empty, where it holds none."""
        return self.places.runs[self._piece(rank)[1]]

    def _piece(self, rank: int) -> tuple[int, int]:
        """Which piece of the batch the rank holds, and which rank of the sequence it is."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(
                f"rank {rank} of a sharding over {self.num_ranks} ranks; it has to be 0 to {self.num_ranks - 1}"
            )
        return self._pieces[rank]
