"""Backward of attention over ranks: turn by turn, from the output and the log of the sum over all keys. Gradients of
keys and values travel to whom they are of, and are summed there."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..blocks.pieces import Piece
from ..blocks.sinks import gradient_of_sinks, with_sinks
from ..blocks.walk import Attended, Gradients, add_gradients
from ..dtypes import dtype_of_sums
from ..wire.tensors import TensorsOnTheWay
from .moves import Arrived, Part, Side
from .source import KeysAndValues, Source
from .spread import Spread, can_attend
from .waiting import back


class Backward:
    """One backward of one rank, from what :class:`Forward` left.

    Attributes:
        dq, d_mask, d_sinks: the gradients, float32 or float64; None for what wants none.
        d_keys: of what travels for keys and values.
        attended, dq_BLnH: of the queries that are there: what is known of them, and where their gradients are added.
        key_sums: of what is there for keys, by the number of its turn: where its gradients are added.
        way: what goes home.
    """

    attended: Attended
    dq_BLnH: Tensor

    def __init__(
        self,
        spread: Spread,
        source: Source,
        tensors: tuple[Tensor, ...],
        attn_mask: Tensor | None,
        sinks_N: Tensor | None,
        learns: Sequence[bool],
    ) -> None:
        """Args: ``tensors``: queries, and what travels for keys. ``learns``: whether the mask, and the sinks, want a
        gradient."""
        self.spread, self.source, self.moves, self.tensors = spread, source, spread.moves, tensors
        self.attn_mask, self.sinks_N, self.options = attn_mask, sinks_N, spread.options_with(attn_mask)
        self.wide = wide = dtype_of_sums(tensors[0])
        self.dq, *self.d_keys = (x.new_zeros(x.shape, dtype=wide) for x in tensors)
        learned = (x if is_learned else None for x, is_learned in zip((attn_mask, sinks_N), learns, strict=True))
        self.d_mask, self.d_sinks = (None if x is None else x.new_zeros(x.shape, dtype=wide) for x in learned)
        self.key_sums: dict[int, list[Tensor]] = {}
        self.way: list[TensorsOnTheWay] = []

    def run(self, grad_BlNH: Tensor, outs: Sequence[Tensor], sums: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
        mine = self.spread.mine
        for at, (q_BLnH, grad_BLnH), keys in self._arrivals(grad_BlNH, kept):
            query_turn = mine.query_turns[at.query_turn]
            if at.key_turn == 0:
                self.dq_BLnH = self.dq if query_turn.is_home else q_BLnH.new_zeros(q_BLnH.shape, dtype=self.wide)
                known = (back(x[at.query_turn], grad_BLnH.device) for x in (outs, sums))
                self.attended = self._attended(grad_BLnH, *known)
            going = self._add(at, q_BLnH, keys)
            if at.key_turn == len(mine.key_turns) - 1 and not query_turn.is_home:
                going.append(self._part(self.moves.queries, at.query_turn, [self.dq_BLnH], [self.dq]))
            if going:  # one at a time, so that memory is that of one
                self._wait()
                self.way = [self.moves.start_home(going)]
        self._wait()

    def _wait(self) -> None:
        for way in self.way:
            way.add()

    def as_inputs(self) -> tuple[Tensor | None, ...]:
        """The gradients of q, the mask, the sinks and of what travels for keys, each in its dtype."""
        q_BlNH, *keys = self.tensors
        sums, likes = (
            (self.dq, self.d_mask, self.d_sinks, *self.d_keys),
            (q_BlNH, self.attn_mask, self.sinks_N, *keys),
        )
        pairs = zip(sums, likes, strict=True)
        return tuple(None if x is None or like is None else x.to(like.dtype) for x, like in pairs)

    def _arrivals(
        self, grad_BlNH: Tensor, kept: Sequence[Tensor]
    ) -> Iterator[tuple[Arrived, tuple[Tensor, Tensor], Sequence[Tensor]]]:
        """For each turn: queries with the gradient of their output, and what there is for keys; what was kept, or
        again."""
        q_BlNH, *keys = self.tensors
        if not self.spread.mine.work.scheme.keep:
            for at in self.moves.arrivals([q_BlNH, grad_BlNH], keys):
                yield at, (at.queries[0], at.queries[1]), at.keys
            return
        left, keys_of_turn, q_BLnH = iter(kept), dict[int, list[Tensor]](), q_BlNH
        device = q_BlNH.device
        for at in self.moves.arrivals([grad_BlNH], []):
            q_BLnH = back(next(left), device) if at.key_turn == 0 else q_BLnH
            if at.query_turn == 0:
                keys_of_turn[at.key_turn] = [next(left) for _ in keys]
            yield at, (q_BLnH, at.queries[0]), [back(x, device) for x in keys_of_turn[at.key_turn]]

    def _attended(self, grad_BLnH: Tensor, out_BLnH: Tensor, lse_BnL: Tensor) -> Attended:
        sinks_n = self.spread.my_sinks(self.sinks_N)
        attended = Attended(
            grad_BLnH=grad_BLnH,
            out_BLnH=out_BLnH,
            lse_BnL=with_sinks(lse_BnL, sinks_n),
            closed_BnL=lse_BnL == -torch.inf,
        )
        if sinks_n is not None and self.d_sinks is not None:
            self.d_sinks.narrow(0, *self.spread.my_heads).add_(gradient_of_sinks(attended, sinks_n))
        return attended

    def _add(self, at: Arrived, q_BLnH: Tensor, keys: Sequence[Tensor]) -> list[Part]:
        """Add the gradients of a turn. Returns what goes home of it: those of keys and values, after the last
        queries."""
        mine = self.spread.mine
        is_home = mine.key_turns[at.key_turn].is_home
        if at.query_turn == 0:
            blank = self.d_keys if is_home else [x.new_zeros(x.shape, dtype=self.wide) for x in keys]
            self.key_sums[at.key_turn] = blank
        pieces = mine.pieces[at.query_turn][at.key_turn]
        self.source.add_gradients(keys, self.key_sums[at.key_turn], pieces, partial(self._add_block, q_BLnH))
        if is_home or at.query_turn < len(mine.query_turns) - 1:
            return []
        return [self._part(self.moves.keys, at.key_turn, self.key_sums.pop(at.key_turn), self.d_keys)]

    def _add_block(self, q_BLnH: Tensor, kv: KeysAndValues, sums: Sequence[Tensor], pieces: Sequence[Piece]) -> None:
        """Add the gradients of these queries, and those of these keys and values to ``sums``."""
        k_BLnH, v_BLnH = self.spread.per_query(kv)
        are_copies = k_BLnH is not kv[0]
        dk, dv = (x.new_zeros(x.shape, dtype=self.wide) for x in (k_BLnH, v_BLnH)) if are_copies else sums
        if can_attend(q_BLnH, k_BLnH, v_BLnH):
            d_mask = self.spread.of_my_heads(self.d_mask)
            grads = Gradients(q_BLnH=self.dq_BLnH, k_BLgH=dk, v_BLgH=dv, mask_BnLL=d_mask)
            add_gradients(grads, self.attended, (q_BLnH, k_BLnH, v_BLnH), pieces, self.options)
        if are_copies:
            index = self.spread.mine.work.heads.kv_of_query(self.spread.mine.head_rank, dk.device)
            for into, grad in zip(sums, (dk, dv), strict=True):
                into.index_add_(2, index, grad)

    def _part(self, side: Side, turn: int, grads: Sequence[Tensor], homes: Sequence[Tensor]) -> Part:
        """Gradients travel in the dtype of the tensors; their sums are taken at home."""
        return Part(side, turn, [grad.to(self.tensors[0].dtype) for grad in grads], homes)
