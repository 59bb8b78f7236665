"""Which rank holds which global token. Whoever needs to know asks here; plans and Ulysses do no such arithmetic.

A batch-major ("BL") shard is *not* one run of global tokens as soon as it holds two rows of the batch; a
sequence-major ("LB") shard of contiguous places is. Formulas that forget this are right for one row, or for even
shards, and wrong for the rest.
"""

from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from typing import overload

import torch
from torch import Tensor

from .grid import HeldGrid
from .on_device import ints_on


class TokenSharding(HeldGrid):
    """The (B, L) grid of tokens over the ranks of a group: each holds some rows, and of these some places.

    The sequence is cut into pieces. A rank of the sequence holds a list of them, in the order of its tensor: in
    contiguous shards its own one. Rank r holds the rows ``r // len(held)`` of ``batch``, and of them the pieces
    ``held[r % len(held)]``, as a DeviceMesh ``("dp", "sp")`` flattens. The same value on every rank: ``rank`` is
    always an argument.

    Args:
        batch: rows of the batch, cut over ranks (a Partition) or not cut (an int).
        seq: positions of the sequence, cut into pieces (a Partition) or not cut (an int).
        order: ``"BL"`` for batch-first tensors (b, l, ...), ``"LB"`` for sequence-first tensors (l, b, ...).
        held: for each rank of the sequence, the numbers of its pieces; if left out, rank r holds piece r.
            :meth:`zigzag`, :meth:`striped` and :meth:`of_runs` make such lists.

    A *local token* numbers a rank's tokens in the order of its flattened tensor. A *global token* numbers the whole
    grid: ``row * L + position`` for "BL", ``position * B + row`` for "LB". Both whatever the order of the pieces.

    Attributes:
        batch: as given, as a Partition.
        seq: the pieces, as a Partition.
        order: as given.
        held: as given, as tuples.
        rectangles: the rows and pieces that each rank holds, in the numbering above.
        places: arithmetic along the sequence, which its ranks share.
        num_ranks: shards, one per rank of the group.
        num_tokens: tokens of the whole grid, B * L.
        global_shape: (B, L), or (L, B) for order "LB".
        local_sizes: tokens that each rank holds.
        local_starts: where each rank's tokens start in a gather over the ranks.
        num_held: tokens that the ranks hold together: all, unless ranks were selected (:meth:`select`).

    Raises:
        ValueError: an unknown order, a batch or seq that is neither a Partition nor an int >= 0, or pieces that are
            held twice or by no rank.
    """

    __slots__ = ()

    @overload
    def global_token(self, local_token: int, rank: int) -> int: ...
    @overload
    def global_token(self, local_token: Tensor, rank: int) -> Tensor: ...
    def global_token(self, local_token: int | Tensor, rank: int) -> int | Tensor:
        """Global token of ``local_token`` (an int, or an int64 tensor of any shape) of ``rank``; the same kind
        back. ValueError for an int that the rank does not hold; tensors are not looked into."""
        rows, length = self.extent(rank)
        if isinstance(local_token, int) and not 0 <= local_token < rows * length:
            raise ValueError(
                f"local token {local_token} of rank {rank}, which holds {rows * length} tokens, from 0 on"
            )
        first_row, first_place = self.first(rank)
        if self.order == "BL":
            row, local_place = local_token // max(length, 1), local_token % max(length, 1)
            return (first_row + row) * self.seq.total + self.places.place(first_place + local_place)
        local_place, row = local_token // max(rows, 1), local_token % max(rows, 1)
        return self.places.place(first_place + local_place) * self.batch.total + first_row + row

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
        stacked = self.places.stacked(position)
        batch_piece, seq_rank = self.batch.owner(row), self.places.lengths.owner(stacked)

        def of_piece(values: Sequence[int], piece: Tensor) -> Tensor:
            return ints_on(values, global_token.device)[piece]

        row = row - of_piece(self.batch.offsets, batch_piece)
        local_place = stacked - of_piece(self.places.lengths.offsets, seq_rank)
        if self.order == "BL":
            local_token = row * of_piece(self.places.lengths.sizes, seq_rank) + local_place
        else:
            local_token = local_place * of_piece(self.batch.sizes, batch_piece) + row
        rank_of_rectangle = [-1] * (len(self.batch) * len(self.held))
        for rank, rectangle in enumerate(self.rectangles):
            rank_of_rectangle[rectangle] = rank
        rank = of_piece(rank_of_rectangle, batch_piece * len(self.held) + seq_rank).masked_fill(outside, -1)
        return rank, torch.where(rank < 0, -1, local_token)

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """(t,) position of each of the rank's tokens in its own sequence, as rotary embeddings need it."""
        rows, length = self.extent(rank)
        position_l = self.places.place(self.first(rank)[1] + torch.arange(length, device=device))
        return position_l.repeat(rows) if self.order == "BL" else position_l.repeat_interleave(rows)

    def rows(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """(t,) row of the whole batch of each of the rank's tokens."""
        rows, length = self.extent(rank)
        row_b = self.first(rank)[0] + torch.arange(rows, device=device)
        return row_b.repeat_interleave(length) if self.order == "BL" else row_b.repeat(length)

    def tokens(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """(t,) global token of each of the rank's tokens, in the order of its flattened tensor."""
        rows, length = self.extent(rank)
        return self.global_token(torch.arange(rows * length, device=device), rank)

    def views(self, x: Tensor, rank: int) -> list[Tensor]:
        """The rank's runs of the whole ``x``, (B, L, ...) or (L, B, ...), in the order of its tensor: views, to read
        or to write. ValueError for another shape."""
        if tuple(x.shape[:2]) != self.global_shape:
            raise ValueError(
                f"a tensor of shape {tuple(x.shape)} to cut by a sharding of the whole {self.global_shape} in order "
                f"{self.order!r}; its first two dimensions have to be {self.global_shape}"
            )
        batch_dim, seq_dim = self._dims
        of_rows = x.narrow(batch_dim, self.first(rank)[0], self.extent(rank)[0])
        return [of_rows.narrow(seq_dim, start, stop - start) for start, stop in self.runs(rank)]

    def split(self, x: Tensor, rank: int) -> list[Tensor]:
        """The same runs of the rank's own tensor, views. ValueError for another shape."""
        self.check_local(x, rank)
        runs = self.runs(rank)
        if len(runs) == 1:
            return [x]
        return list(x.split([stop - start for start, stop in runs], self._dims[1]))

    def shard(self, x: Tensor, rank: int) -> Tensor:
        """This rank's tokens of the whole ``x``, (B, L, ...) or (L, B, ...): a view where they are one run, else a
        copy. ValueError for another shape."""
        views = self.views(x, rank)
        return views[0] if len(views) == 1 else torch.cat(views, self._dims[1])

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole (B, L, ...) or (L, B, ...) from every rank's tokens, in rank order: the inverse of
        :meth:`shard`. ValueError for tensors of another number or shape, or a sharding that leaves tokens out."""
        self.check_whole("unshard")
        if len(shards) != self.num_ranks:
            raise ValueError(
                f"{len(shards)} shards for {self.num_ranks} ranks; unshard needs every rank's piece, in rank order"
            )
        runs_of_rank = [self.split(shard, rank) for rank, shard in enumerate(shards)]
        batch_dim, seq_dim = self._dims
        rank_of_rectangle = {rectangle: rank for rank, rectangle in enumerate(self.rectangles)}
        rows: list[Tensor] = []
        for i in range(len(self.batch)):
            ranks = [rank_of_rectangle[i * len(self.held) + j] for j in range(len(self.held))]
            starts = [start for rank in ranks for start, _ in self.runs(rank)]
            runs = zip(starts, chain(*(runs_of_rank[rank] for rank in ranks)), strict=True)
            rows.append(torch.cat([run for _, run in sorted(runs, key=itemgetter(0))], dim=seq_dim))
        return torch.cat(rows, dim=batch_dim)

    @property
    def _dims(self) -> tuple[int, int]:
        """The dimensions of rows and of places."""
        return (0, 1) if self.order == "BL" else (1, 0)
