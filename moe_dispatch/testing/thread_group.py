# pyright: reportIncompatibleMethodOverride=false
# torch's stub adds, to each method, an overload and names of arguments that torch.distributed does not use.
"""A process group whose ranks are threads of one process.

Every collective is one exchange: a rank gives a tensor to each rank, and makes its output of those that it gets.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from .meeting import Message, Room, ThreadWork
from .turns import Turns

Rooms = dict[tuple[str, tuple[int, ...]], Room]  # by name and ranks of a group: one room for all its ranks


class ThreadGroup(dist.ProcessGroup):
    """One rank's view of a group. torch.distributed calls these methods, by these names."""

    def __init__(self, name: str, ranks: Sequence[int], rank: int, turns: Turns, rooms: Rooms) -> None:
        init: Any = super().__init__  # torch's stub knows only the form that takes a store
        init(ranks.index(rank), len(ranks))
        self._name, self._ranks, self._turns, self._rooms = name, tuple(ranks), turns, rooms
        self._room = rooms.setdefault((name, self._ranks), Room(self._ranks))
        self._num_joined = 0

    @property
    def group_name(self) -> str:
        return self._name

    def new_group(self, ranks: Sequence[int], *, group_name: str, **_: Any) -> "ThreadGroup | None":
        """What dist.new_group asks of the default group: a group of these global ranks."""
        rank = self._ranks[self.rank()]
        return ThreadGroup(group_name, ranks, rank, self._turns, self._rooms) if rank in ranks else None

    def shutdown(self) -> None:
        """What dist.destroy_process_group calls. Nothing is open."""

    # ---- rows for each, from each ----

    def all_to_all_single(
        self, out: Tensor, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], opts: Any = None
    ) -> ThreadWork:
        sizes, out_sizes = self._numbers_of(x, in_splits), self._numbers_of(out, out_splits)
        facts = f"all_to_all_single of {x.dtype}"
        return self._exchange(facts, [x], lambda copies: copies[0].split(sizes), _flat(out).split(out_sizes))

    def alltoall(self, outs: list[Tensor], xs: list[Tensor], opts: Any = None) -> ThreadWork:
        return self._exchange(f"all_to_all of {xs[0].dtype}", xs, list, [_flat(out) for out in outs])

    # ---- the same for all ----

    def allgather(self, outs: list[list[Tensor]], xs: list[Tensor], opts: Any = None) -> ThreadWork:
        return self._exchange(f"all_gather of {xs[0].dtype}", xs, self._to_all, [_flat(out) for out in outs[0]])

    def all_gather_single(self, out: Tensor, x: Tensor, opts: Any = None) -> ThreadWork:
        outs = _flat(out).tensor_split(self.size())
        return self._exchange(f"all_gather_single of {x.dtype}", [x], self._to_all, outs)

    def all_gather_single_coalesced(self, outs: list[Tensor], xs: list[Tensor], opts: Any = None) -> ThreadWork:
        return _last_of(self.all_gather_single(out, x) for out, x in zip(outs, xs, strict=True))

    def barrier(self, opts: Any = None) -> ThreadWork:
        return self._exchange("barrier", [], self._to_none, self._to_none())

    # ---- from one, or to one ----

    def broadcast(self, xs: list[Tensor], opts: Any) -> ThreadWork:
        (x,), is_root = xs, self.rank() == opts.rootRank
        outs = self._at(opts.rootRank, _flat(x))
        sources, deal = (xs, self._to_all) if is_root else ([], self._to_none)
        return self._exchange(f"broadcast of {x.dtype} from rank {opts.rootRank}", sources, deal, outs)

    def scatter(self, outs: list[Tensor], xs: list[list[Tensor]], opts: Any) -> ThreadWork:
        (out,), is_root = outs, self.rank() == opts.rootRank
        sources, deal = (xs[0], list) if is_root else ([], self._to_none)
        facts = f"scatter of {out.dtype} from rank {opts.rootRank}"
        return self._exchange(facts, sources, deal, self._at(opts.rootRank, _flat(out)))

    def gather(self, outs: list[list[Tensor]], xs: list[Tensor], opts: Any) -> ThreadWork:
        (x,), is_root = xs, self.rank() == opts.rootRank
        outs_of_root = [_flat(out) for out in outs[0]] if is_root else self._to_none()
        facts = f"gather of {x.dtype} to rank {opts.rootRank}"
        return self._exchange(facts, xs, lambda copies: self._at(opts.rootRank, copies[0]), outs_of_root)

    def send(self, *_: Any) -> ThreadWork:
        raise _not_here("send")

    def recv(self, *_: Any) -> ThreadWork:
        raise _not_here("recv")

    def recv_anysource(self, *_: Any) -> ThreadWork:
        raise _not_here("recv")

    def reduce(self, *_: Any) -> ThreadWork:
        raise _not_here("reduce")

    # ---- sums ----

    def allreduce(self, xs: list[Tensor], opts: Any) -> ThreadWork:
        return self._reduce("all_reduce", xs, self._to_all, xs[0], opts)

    def allreduce_coalesced(self, xs: list[Tensor], opts: Any) -> ThreadWork:
        return _last_of(self.allreduce([x], opts) for x in xs)

    def reduce_scatter(self, outs: list[Tensor], xs: list[list[Tensor]], opts: Any) -> ThreadWork:
        return self._reduce("reduce_scatter", xs[0], list, outs[0], opts)

    def reduce_scatter_single(self, out: Tensor, x: Tensor, opts: Any) -> ThreadWork:
        parts = self.size()
        return self._reduce("reduce_scatter_single", [x], lambda copies: copies[0].tensor_split(parts), out, opts)

    def reduce_scatter_single_coalesced(self, outs: list[Tensor], xs: list[Tensor], opts: Any) -> ThreadWork:
        return _last_of(self.reduce_scatter_single(out, x, opts) for out, x in zip(outs, xs, strict=True))

    # ---- what all of them are ----

    def _to_all(self, copies: list[Tensor]) -> list[Tensor]:
        return copies * self.size()

    def _to_none(self, _: object = None) -> list[Tensor]:
        return [torch.empty(0, device="cpu")] * self.size()

    def _at(self, root: int, x: Tensor) -> list[Tensor]:
        """``x`` for one rank of the group, and nothing for the others."""
        return [x if rank == root else x[:0] for rank in range(self.size())]

    def _numbers_of(self, x: Tensor, splits: Sequence[int]) -> list[int]:
        """How many numbers each rank's rows have."""
        rows = x.shape[0]
        splits = splits or [rows // self.size()] * self.size()
        if len(splits) != self.size() or sum(splits) != rows:
            raise RuntimeError(
                f"split sizes {list(splits)} for {rows} rows in a group of {self.size()}; they have to be one per "
                "rank and to sum to the rows"
            )
        return [rows_of_rank * (x.numel() // max(rows, 1)) for rows_of_rank in splits]

    def _reduce(
        self, name: str, xs: list[Tensor], deal: Callable[[list[Tensor]], Sequence[Tensor]], out: Tensor, opts: Any
    ) -> ThreadWork:
        kind, out = opts.reduceOp.op, _flat(out)
        facts = f"{name} {kind.name} of {xs[0].dtype}"
        return self._exchange(facts, xs, deal, [out] * self.size(), lambda xs: out.copy_(_reduced(kind, xs)))

    def _exchange(
        self,
        facts: str,
        sources: Sequence[Tensor],
        deal: Callable[[list[Tensor]], Sequence[Tensor]],
        outs: Sequence[Tensor],
        receive: Callable[[list[Tensor]], object] | None = None,
    ) -> ThreadWork:
        """Join the next collective of this group.

        Args:
            facts: name, dtype and the like: the same on all ranks.
            sources: what this rank sends; copied now.
            deal: from flat copies of them to a tensor for each rank.
            outs: flat, of the size of what comes from each rank.
            receive: makes the output of what came; without it, each part is written to its place in ``outs``.
        """
        dtypes = {x.dtype for x in (*sources, *outs) if x.numel()}
        if len(dtypes) > 1:
            raise RuntimeError(
                f"dtypes {sorted(map(str, dtypes))} in one {facts}; what a rank sends and gets has one"
            )
        copies = [_flat(source).clone() for source in sources]
        expected = [out.numel() for out in outs]
        message = Message(facts=facts, sources=sources, copies=copies, sent=deal(copies), expected=expected)
        meeting = self._room.join(self._num_joined, self.rank(), message)
        self._num_joined += 1
        write = receive or functools.partial(_write_each, outs)
        return ThreadWork(self._turns, self.rank(), meeting, write)


def _flat(x: Tensor) -> Tensor:
    """The numbers of ``x`` in one dimension, behind autograd's back, as a backend sees them."""
    if not x.is_contiguous():
        raise RuntimeError(
            f"a tensor of shape {tuple(x.shape)} with strides {x.stride()} in a collective; a backend moves memory "
            "as it lies: pass x.contiguous()"
        )
    return x.data.view(-1)


def _write_each(outs: Sequence[Tensor], received: list[Tensor]) -> None:
    for out, x in zip(outs, received, strict=True):
        out.copy_(x)


def _reduced(kind: Any, xs: list[Tensor]) -> Tensor:
    """In rank order, so that every rank gets the same bits."""
    if kind == ReduceOp.SUM:
        return functools.reduce(torch.add, xs)
    if kind == ReduceOp.AVG:
        return functools.reduce(torch.add, xs) / len(xs)
    if kind == ReduceOp.MAX:
        return functools.reduce(torch.maximum, xs)
    if kind == ReduceOp.MIN:
        return functools.reduce(torch.minimum, xs)
    if kind == ReduceOp.PRODUCT:
        return functools.reduce(torch.mul, xs)
    raise RuntimeError(
        f"ReduceOp {kind.name} between ranks that are threads; it has to be SUM, AVG, MAX, MIN, PRODUCT"
    )


def _not_here(name: str) -> RuntimeError:
    return RuntimeError(f"{name} between ranks that are threads; they have collectives only: use a RankPool")


def _last_of(works: Iterable[ThreadWork]) -> ThreadWork:
    """Wait for all but the last."""
    *first, last = works
    for work in first:
        work.wait()
    return last
