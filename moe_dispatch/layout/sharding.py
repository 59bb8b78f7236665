"""Which rank holds which global token. Whoever needs to know asks here; plans and Ulysses do no such arithmetic.

A batch-major ("BL") shard is *not* one run of global tokens as soon as it holds two rows of the batch; a
sequence-major ("LB") shard of the sequence is. Formulas that forget this are right for one row, or for even shards,
and wrong for the rest.
"""

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from .frozen import Frozen
from .partition import Partition, check_count

T = TypeVar("T")


class TokenSharding(Frozen):
    """The (B, L) grid of tokens cut into rectangles, one per rank of a group.

    Rank r holds the rectangle ``(r // len(seq), r % len(seq))`` of ``batch`` x ``seq``, as a DeviceMesh ``("dp",
    "sp")`` flattens. The same value on every rank: ``rank`` is always an argument.

    Args:
        batch: rows of the batch, cut over ranks (a Partition) or not cut (an int).
        seq: positions of the sequence, cut over ranks (a Partition) or not cut (an int).
        order: ``"BL"`` for batch-first tensors (b, l, ...), ``"LB"`` for sequence-first tensors (l, b, ...).

    A *local token* numbers a rank's tokens in the order of its flattened tensor. A *global token* numbers the whole
    grid: ``row * L + position`` for "BL", ``position * B + row`` for "LB".

    Attributes:
        batch: as given, as a Partition.
        seq: as given, as a Partition.
        order: as given.
        rectangles: the rectangle that each rank holds, in the numbering above.
        num_ranks: shards, one per rank of the group.
        num_tokens: tokens of the whole grid, B * L.
        global_shape: (B, L), or (L, B) for order "LB".
        local_sizes: tokens that each rank holds.
        local_starts: where each rank's tokens start in a gather over the ranks.
        num_held: tokens that the ranks hold together: all, unless ranks were selected (:meth:`select`).

    Raises:
        ValueError: an unknown order, or a batch or seq that is neither a Partition nor an int >= 0.
    """

    batch: Partition
    seq: Partition
    order: Literal["BL", "LB"]
    rectangles: tuple[int, ...]
    num_ranks: int
    num_tokens: int
    global_shape: tuple[int, int]
    local_sizes: tuple[int, ...]
    local_starts: tuple[int, ...]
    num_held: int
    _pieces: tuple[tuple[int, int], ...]
    _kept: dict[Hashable, Any]

    __slots__ = tuple(__annotations__)
    _defining = ("batch", "seq", "order", "rectangles")

    def __init__(self, *, batch: Partition | int, seq: Partition | int, order: Literal["BL", "LB"] = "BL") -> None:
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
        self._hold(tuple(range(len(self.batch) * len(self.seq))))

    def _hold(self, rectangles: tuple[int, ...]) -> None:
        """Store which rank holds which rectangle, and what follows: asked for in every call, so never recomputed."""
        rows, length = self.batch.total, self.seq.total
        width = len(self.seq)
        pieces = tuple((i // width, i % width) for i in rectangles)
        local_sizes = tuple(self.batch.sizes[i] * self.seq.sizes[j] for i, j in pieces)
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
    def _of(cls, *value: Any) -> "TokenSharding":
        batch, seq, order, rectangles = value
        sharding = cls(batch=batch, seq=seq, order=order)
        sharding._hold(rectangles)
        return sharding

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gives, made once for each ``key`` and kept for as long as this object lives: for tensors that
        depend on the sharding and the key only, and that nobody writes to."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def local_shape(self, rank: int) -> tuple[int, int]:
        """(b, l), or (l, b) for order "LB"."""
        rows, length = self.extent(rank)
        return (rows, length) if self.order == "BL" else (length, rows)

    @overload
    def global_token(self, local_token: int, rank: int) -> int: ...
    @overload
    def global_token(self, local_token: Tensor, rank: int) -> Tensor: ...
    def global_token(self, local_token: int | Tensor, rank: int) -> int | Tensor:
        """Global token of ``local_token`` (an int, or an int64 tensor of any shape) of ``rank``; the same kind
        back. ValueError for an int that the rank does not hold; tensors are not looked into."""
        (rows, length), (first_row, first_position) = self.extent(rank), self.corner(rank)
        if isinstance(local_token, int) and not 0 <= local_token < rows * length:
            raise ValueError(
                f"local token {local_token} of rank {rank}, which holds {rows * length} tokens, from 0 on"
            )
        if self.order == "BL":
            row, position = local_token // max(length, 1), local_token % max(length, 1)
            return (first_row + row) * self.seq.total + first_position + position
        position, row = local_token // max(rows, 1), local_token % max(rows, 1)
        return (first_position + position) * self.batch.total + first_row + row

    def locate(self, global_token: Tensor) -> tuple[Tensor, Tensor]:
        """(rank, local token) of each global token: the inverse of :meth:`global_token`.

        A token that no rank of this sharding holds (see :meth:`select`), or that there is not, has rank -1 and local
        token -1.
        """
        outside = (global_token < 0) | (global_token >= self.num_tokens)
        inner = max(self.global_shape[1], 1)
        token = global_token.masked_fill(outside, 0)
        outer, inner = token // inner, token % inner
        row, position = (outer, inner) if self.order == "BL" else (inner, outer)
        batch_piece, seq_piece = self.batch.owner(row), self.seq.owner(position)

        def of_piece(values: Sequence[int], piece: Tensor) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=global_token.device)[piece]

        row = row - of_piece(self.batch.offsets, batch_piece)
        position = position - of_piece(self.seq.offsets, seq_piece)
        if self.order == "BL":
            local_token = row * of_piece(self.seq.sizes, seq_piece) + position
        else:
            local_token = position * of_piece(self.batch.sizes, batch_piece) + row
        rank_of_rectangle = [-1] * (len(self.batch) * len(self.seq))
        for rank, rectangle in enumerate(self.rectangles):
            rank_of_rectangle[rectangle] = rank
        rank = of_piece(rank_of_rectangle, batch_piece * len(self.seq) + seq_piece).masked_fill(outside, -1)
        return rank, torch.where(rank < 0, -1, local_token)

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """(t,) position of each of the rank's tokens in its own sequence, as rotary embeddings need it."""
        rows, length = self.extent(rank)
        position_l = self.corner(rank)[1] + torch.arange(length, device=device)
        return position_l.repeat(rows) if self.order == "BL" else position_l.repeat_interleave(rows)

    def rows(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """(t,) row of the whole batch of each of the rank's tokens."""
        rows, length = self.extent(rank)
        row_b = self.corner(rank)[0] + torch.arange(rows, device=device)
        return row_b.repeat_interleave(length) if self.order == "BL" else row_b.repeat(length)

    def tokens(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """(t,) global token of each of the rank's tokens, in the order of its flattened tensor."""
        rows, length = self.extent(rank)
        return self.global_token(torch.arange(rows * length, device=device), rank)

    def shard(self, x: Tensor, rank: int) -> Tensor:
        """This rank's piece, a view, of the whole ``x``: (B, L, ...) or (L, B, ...). ValueError for another shape."""
        if tuple(x.shape[:2]) != self.global_shape:
            raise ValueError(
                f"a tensor of shape {tuple(x.shape)} to cut by a sharding of the whole {self.global_shape} in order "
                f"{self.order!r}; its first two dimensions have to be {self.global_shape}"
            )
        starts = self.corner(rank) if self.order == "BL" else self.corner(rank)[::-1]
        for dim, (start, size) in enumerate(zip(starts, self.local_shape(rank), strict=True)):
            x = x.narrow(dim, start, size)
        return x

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole (B, L, ...) or (L, B, ...) from every rank's piece, in rank order: the inverse of
        :meth:`shard`. ValueError for pieces of another number or shape, or a sharding that leaves tokens out."""
        self.check_whole("unshard")
        if len(shards) != self.num_ranks:
            raise ValueError(
                f"{len(shards)} shards for {self.num_ranks} ranks; unshard needs every rank's piece, in rank order"
            )
        for rank, shard in enumerate(shards):
            self.check_local(shard, rank)
        batch_dim, seq_dim = (0, 1) if self.order == "BL" else (1, 0)
        shard_of_rectangle = dict(zip(self.rectangles, shards, strict=True))
        rows = [
            torch.cat([shard_of_rectangle[i * len(self.seq) + j] for j in range(len(self.seq))], dim=seq_dim)
            for i in range(len(self.batch))
        ]
        return torch.cat(rows, dim=batch_dim)

    def select(self, ranks: Sequence[int]) -> "TokenSharding":
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
        return TokenSharding._of(self.batch, self.seq, self.order, tuple(self.rectangles[rank] for rank in ranks))

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
        """(rows, positions) of the rank's rectangle, for either order."""
        i, j = self._piece(rank)
        return self.batch.sizes[i], self.seq.sizes[j]

    def corner(self, rank: int) -> tuple[int, int]:
        """(row, position) of the rank's first token, for either order."""
        i, j = self._piece(rank)
        return self.batch.offsets[i], self.seq.offsets[j]

    def _piece(self, rank: int) -> tuple[int, int]:
        """Which piece of the batch and which of the sequence the rank holds."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(
                f"rank {rank} of a sharding over {self.num_ranks} ranks; it has to be 0 to {self.num_ranks - 1}"
            )
        return self._pieces[rank]
