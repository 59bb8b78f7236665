"""Forward of attention over ranks: turn by turn, each merged with those before by the log of its sum."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks.sinks import add_sinks
from ..blocks.walk import add_attention
from ..dtypes import dtype_of_sums
from ..wire.tensors import TensorsOnTheWay
from .moves import Arrived, Part
from .spread import Spread, can_attend
from .waiting import away


class Forward:
    """One forward of one rank.

    Attributes:
        outs, sums: for each turn of queries, the output (B, rows, n, Hv) and the log of the sum over the keys (B, n,
            rows), -inf where there was none.
        kept: the tensors that came, queries and then keys and values turn by turn, if the scheme keeps them.
    """

    def __init__(self, spread: Spread, q_BlNH: Tensor) -> None:
        self.spread, self.moves, self.q_BlNH, self.width = spread, spread.moves, q_BlNH, spread.value_width
        self.outs, self.sums, self.kept = list[Tensor](), list[Tensor](), list[Tensor]()

    def run(
        self,
        keys: Sequence[Tensor],
        weights: Sequence[Tensor],
        attn_mask: Tensor | None,
        sinks_N: Tensor | None,
    ) -> Tensor:
        spread, mine = self.spread, self.spread.mine
        source = spread.source(weights, [False] * len(weights))
        options, sinks_n = spread.options_with(attn_mask), spread.my_sinks(sinks_N)
        offload = mine.work.scheme.offload
        home = not mine.query_turns[0].is_home
        out_BlNH = self.q_BlNH.new_empty(*self.q_BlNH.shape[:3], self.width) if home else self.q_BlNH.new_empty(0)
        sums_BLnH = lse_BnL = self.q_BlNH.new_empty(0)
        way: list[TensorsOnTheWay] = []
        for at in self.moves.arrivals([self.q_BlNH], keys):
            (q_BLnH,) = at.queries
            self._keep(at)
            if at.key_turn == 0:
                sums_BLnH, lse_BnL = nothing(q_BLnH, self.width)
            for kv, pieces in source.blocks(at.keys, mine.pieces[at.query_turn][at.key_turn]):
                k_BLgH, v_BLgH = spread.per_query(kv)
                if can_attend(q_BLnH, k_BLgH, v_BLgH):
                    add_attention(sums_BLnH, lse_BnL, (q_BLnH, k_BLgH, v_BLgH), pieces, options)
            if at.key_turn == len(mine.key_turns) - 1:
                add_sinks(sums_BLnH, lse_BnL, sinks_n)
                out_BLnH = sums_BLnH.to(self.q_BlNH.dtype)
                self.outs.append(away(out_BLnH, offload and home))
                self.sums.append(away(lse_BnL, offload))
                if home:
                    going = Part(self.moves.queries, at.query_turn, [out_BLnH], [out_BlNH])
                    _wait(way)
                    way = [self.moves.start_home([going])]
        _wait(way)
        return out_BlNH if home else self.outs[0]

    def _keep(self, at: Arrived) -> None:
        mine = self.spread.mine
        scheme = mine.work.scheme
        if scheme.keep and at.key_turn == 0:
            is_home = mine.query_turns[at.query_turn].is_home
            self.kept += [away(x, scheme.offload and not is_home) for x in at.queries]
        if scheme.keep and at.query_turn == 0:
            is_home = mine.key_turns[at.key_turn].is_home
            self.kept += [away(x, scheme.offload and not is_home) for x in at.keys]


def _wait(way: list[TensorsOnTheWay]) -> None:
    """For what goes home, one at a time, so that memory is that of one."""
    for each in way:
        each.fill()


def nothing(q_BLnH: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Output and log of the sum before any key, float32 or float64: (B, L, n, Hv) and (B, n, L)."""
    batch, length, heads, _ = q_BLnH.shape
    dtype = dtype_of_sums(q_BLnH)
    out_BLnH = q_BLnH.new_zeros(batch, length, heads, width, dtype=dtype)
    return out_BLnH, q_BLnH.new_full((batch, heads, length), -torch.inf, dtype=dtype)
