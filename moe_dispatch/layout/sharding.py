"""Which rank holds which global token: every line of index arithmetic of the two packages.

A batch-major ("BL") shard is *not* one run of global tokens as soon as it holds two rows of the batch; a
sequence-major ("LB") shard of the sequence is. Formulas that forget this are right for one row, or for even shards,
and wrong for the rest.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from .partition import Partition, check_count

T = TypeVar("T")


@dataclass(frozen=True, slots=True, init=False)
class TokenSharding:
    """The (B, L) grid of tokens cut into rectangles, one per rank of a group.

    Rank r holds the rectangle ``(r // len(seq), r % len(seq))`` of ``batch`` x ``seq``, as a DeviceMesh ``("dp",
    "sp")`` flattens. The same value on every rank: ``rank`` is always an argument.

    Args:
        batch: rows of the batch, cut over ranks (a Partition) or not cut (an int).
        seq: positions of the sequence, cut over ranks (a Partition) or not cut (an int).
        order: ``"BL"`` for batch-first tensors (b, l, ...), ``"LB"`` for sequence-first tensors (l, b, ...).

    A *local token* numbers a rank's tokens in the order of its flattened tensor. A *global token* numbers the whole
    grid: ``row * L + position`` for "BL", ``position * B + row`` for "LB".

    Raises:
        ValueError: an unknown order, or a batch or seq that is neither a Partition nor an int >= 0.
    """

    batch: Partition
    seq: Partition
    order: Literal["BL", "LB"]
    rectangles: tuple[int, ...]
    _kept: dict[Hashable, Any] = field(repr=False, compare=False)

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
        object.__setattr__(self, "rectangles", tuple(range(len(self.batch) * len(self.seq))))
        object.__setattr__(self, "_kept", {})

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles leave what is kept behind."""
        return _rebuilt, (self.batch, self.seq, self.order, self.rectangles)

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gives, made once for each ``key`` and kept for as long as this object lives: for tensors that
        depend on the sharding and the key only, and that nobody writes to."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @property
    def num_ranks(self) -> int:
        """Shards that this sharding describes, one per rank of its group."""
        return len(self.rectangles)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole grid, B * L."""
        return self.batch.total * self.seq.total

    @property
    def local_sizes(self) -> tuple[int, ...]:
        """Tokens that each rank holds."""
        return tuple(rows * length for rows, length in map(self._extent, range(self.num_ranks)))

    @property
    def local_starts(self) -> tuple[int, ...]:
        """Where each rank's tokens start in a gather over the ranks."""
        return tuple(accumulate(self.local_sizes[:-1], initial=0))

    def local_shape(self, rank: int) -> tuple[int, int]:
        """(b, l), or (l, b) for order "LB"."""
        rows, length = self._extent(rank)
        return (rows, length) if self.order == "BL" else (length, rows)

    @property
    def global_shape(self) -> tuple[int, int]:
        """(B, L), or (L, B) for order "LB"."""
        rows, length = self.batch.total, self.seq.total
        return (rows, length) if self.order == "BL" else (length, rows)

    @overload
    def global_token(self, local_token: int, rank: int) -> int: ...
    @overload
    def global_token(self, local_token: Tensor, rank: int) -> Tensor: ...
    def global_token(self, local_token: int | Tensor, rank: int) -> int | Tensor:
        """Global token of ``local_token`` (an int, or an int64 tensor of any shape) of ``rank``; the same kind
        back. ValueError for an int that the rank does not hold; tensors are not looked into."""
        (rows, length), (first_row, first_position) = self._extent(rank), self._corner(rank)
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
        rows, length = self._extent(rank)
        position_l = self._corner(rank)[1] + torch.arange(length, device=device)
        return position_l.repeat(rows) if self.order == "BL" else position_l.repeat_interleave(rows)

    def rows(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """(t,) row of the whole batch of each of the rank's tokens."""
        rows, length = self._extent(rank)
        row_b = self._corner(rank)[0] + torch.arange(rows, device=device)
        return row_b.repeat_interleave(length) if self.order == "BL" else row_b.repeat(length)

    def tokens(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """(t,) global token of each of the rank's tokens, in the order of its flattened tensor."""
        rows, length = self._extent(rank)
        return self.global_token(torch.arange(rows * length, device=device), rank)

    def stacked_ranks(self, device: torch.device | str = "cpu") -> Tensor:
        """(sum of local_sizes,) rank of every held token, rank after rank, as a gather over the ranks delivers
        them."""
        sizes = self.local_sizes
        size_P = torch.tensor(sizes, dtype=torch.int64, device=device)
        return torch.arange(len(sizes), device=device).repeat_interleave(size_P, output_size=sum(sizes))

    def stacked_tokens(self, device: torch.device | str = "cpu") -> Tensor:
        """(sum of local_sizes,) global token of every held token, in the order of :meth:`stacked_ranks`."""
        rank_of_G = self.stacked_ranks(device)
        outer_of_P, inner_of_P = zip(*(self._corner(rank) for rank in range(self.num_ranks)), strict=True)
        if self.order == "LB":
            outer_of_P, inner_of_P = inner_of_P, outer_of_P
        lengths = [max(self.local_shape(rank)[1], 1) for rank in range(self.num_ranks)]
        facts_P4 = torch.tensor(
            list(zip(self.local_starts, lengths, outer_of_P, inner_of_P, strict=True)), device=device
        )
        start_G, length_G, outer_G, inner_G = facts_P4.index_select(0, rank_of_G).unbind(1)
        local_G = torch.arange(len(rank_of_G), device=device) - start_G
        return (outer_G + local_G // length_G) * self.global_shape[1] + inner_G + local_G % length_G

    def shard(self, x: Tensor, rank: int) -> Tensor:
        """This rank's piece, a view, of the whole ``x``: (B, L, ...) or (L, B, ...). ValueError for another shape."""
        if tuple(x.shape[:2]) != self.global_shape:
            raise ValueError(
                f"a tensor of shape {tuple(x.shape)} to cut by a sharding of the whole {self.global_shape} in order "
                f"{self.order!r}; its first two dimensions have to be {self.global_shape}"
            )
        starts = self._corner(rank) if self.order == "BL" else self._corner(rank)[::-1]
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
            self._check_rank(rank)
        if not ranks or len(set(ranks)) != len(ranks):
            raise ValueError(f"ranks {ranks} selected; name at least one rank, and each once")
        return _rebuilt(self.batch, self.seq, self.order, tuple(self.rectangles[rank] for rank in ranks))

    def check_local(self, x: Tensor, rank: int) -> None:
        """Raise ValueError unless ``x`` has the shape (b, l, ...) or (l, b, ...) that ``rank`` holds."""
        if tuple(x.shape[:2]) != self.local_shape(rank):
            raise ValueError(
                f"rank {rank} has a tensor of shape {tuple(x.shape)}, but its shard in order {self.order!r} is "
                f"{self.local_shape(rank)}; pass this rank's tokens, as sharding.shard(x, {rank}) cuts them"
            )

    def check_whole(self, what: str) -> None:
        """Raise ValueError if some token of the grid is held by none of the ranks."""
        if sum(self.local_sizes) != self.num_tokens:
            raise ValueError(
                f"{what} needs every token of the grid, but the ranks of this sharding hold {sum(self.local_sizes)} "
                f"of {self.num_tokens}; describe the tokens that this group holds, not a selection of a larger mesh"
            )

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.num_ranks:
            raise ValueError(
                f"rank {rank} of a sharding over {self.num_ranks} ranks; it has to be 0 to {self.num_ranks - 1}"
            )

    def _piece(self, rank: int) -> tuple[int, int]:
        self._check_rank(rank)
        return divmod(self.rectangles[rank], len(self.seq))

    def _extent(self, rank: int) -> tuple[int, int]:
        """(rows, positions) of the rank's rectangle."""
        i, j = self._piece(rank)
        return self.batch.sizes[i], self.seq.sizes[j]

    def _corner(self, rank: int) -> tuple[int, int]:
        """(row, position) of the rank's first token."""
        i, j = self._piece(rank)
        return self.batch.offsets[i], self.seq.offsets[j]


def _rebuilt(
    batch: Partition, seq: Partition, order: Literal["BL", "LB"], rectangles: tuple[int, ...]
) -> TokenSharding:
    sharding = TokenSharding(batch=batch, seq=seq, order=order)
    object.__setattr__(sharding, "rectangles", rectangles)
    return sharding
