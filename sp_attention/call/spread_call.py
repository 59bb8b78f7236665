"""A call of attention over ranks that all of them mean: its work, and how it is computed."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_dispatch import TokenSharding

from ..attend.documents import Documents
from ..attend.masks import keys_without_padding, queries_without_padding, sides_of, with_lost_queries
from ..attend.parts import FIRST_KEY, FIRST_QUERY, attend_parts
from ..blocks.dropout import Dropout
from ..blocks.tile import Options
from ..spread.by_attend import output_home, tensors_to_work
from ..spread.function import attend_spread
from ..spread.spread import Spread
from ..wire.order import batch_first, in_order
from ..work.kept import Asked, rank_work
from ..work.parts import parts
from ..work.plan import RankWork
from .attend_arguments import FIRST_HEAD, takes
from .inputs import AttentionInputs
from .options import (
    Given,
    options_of_my_heads,
    options_of_part,
)
from .outcome import Attend, RecomputedSoFar, output_or_problem
from .words import words_first

TILE = 512  # queries and keys that are computed at once


def work_of(inputs: AttentionInputs, given: Given, documents: Documents | None, *, at_once: bool) -> RankWork:
    """What this rank computes, and which rows it needs and sends."""
    value = {option.name: value for option, value in given}
    queries, keys = inputs.lengths
    spans = ((0, queries, 0, keys),)
    if documents is not None:
        spans = tuple((start, end, start, end) for start, end in documents.spans)
    asked = Asked(
        scheme=inputs.scheme,
        heads=inputs.heads,
        at_once=at_once,
        kv_sharding=inputs.kv_sharding,
        spans=spans,
        sides=sides_of("is_causal" in value, value.get("window")),
    )
    return rank_work(inputs.sharding, inputs.rank, asked)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call that all ranks mean: what is left is to compute it.

    Attributes:
        inputs: the tensors.
        given: the options.
        seed: of the group's first rank.
        mine: what this rank does.
    """

    inputs: AttentionInputs
    given: Given
    seed: Tensor
    mine: RankWork

    def in_tiles(self) -> Tensor:
        value = self._values()
        q_BlNH, k_BlGH, v_BlGH, lost_Bln1 = self._without_padding(value.get("key_padding_mask"))
        p, mask = value.get("dropout_p"), value.get("attn_mask")
        options = Options(
            scale=value.get("scale", q_BlNH.shape[3] ** -0.5),
            attn_mask=None,
            key_padding_mask=value.get("key_padding_mask"),
            dropout=None if p is None else Dropout(p=p, seed=self.seed, first_head=self.inputs.first_head),
            chunk=min(TILE, self.inputs.scheme.chunk),
        )
        spread = Spread(mine=self.mine, group=self.inputs.group, options=options)
        mask = None if mask is None else mask[(None,) * (4 - mask.ndim)]
        out_BlNH = attend_spread(spread, q_BlNH, k_BlGH, v_BlGH, mask, value.get("sinks_N"))
        return in_order(with_lost_queries(out_BlNH, lost_Bln1), self.inputs.sharding)

    def by_attend(self, attend: Attend) -> Tensor:
        """Whole keys come to ``attend``, and its output goes home, under autograd."""
        inputs, mine = self.inputs, self.mine
        *tensors, lost_Bln1 = self._without_padding(self._values().get("key_padding_mask"))
        q_BLnH, k_BLgH, v_BLgH = tensors_to_work(mine, inputs.group, *tensors)
        k_BLgH, v_BLgH = (inputs.heads.kv_for_queries(x, inputs.head_rank) for x in (k_BLgH, v_BLgH))
        options = options_of_my_heads(self.given, inputs, self.seed)
        firsts = {FIRST_HEAD: inputs.first_head, FIRST_QUERY: 0, FIRST_KEY: 0}
        options |= {name: first for name, first in firsts.items() if takes(attend, name)}
        calls = parts(mine.work.seen, mine.query_turns[0].rows, mine.key_turns[0].rows)
        attend_whole = partial(attend_parts, attend, parts=calls, options_of_part=options_of_part)
        out_BLnH, statement = output_or_problem(attend_whole, q_BLnH, k_BLgH, v_BLgH, options)
        words_first(statement, torch.zeros_like(self.seed), inputs.group)
        out_BlNH = output_home(mine, inputs.group, RecomputedSoFar.apply(out_BLnH), tensors[0])  # type: ignore[arg-type]
        return in_order(with_lost_queries(out_BlNH, lost_Bln1), inputs.sharding)

    def _values(self) -> dict[str, Any]:
        return {option.name: value for option, value in self.given}

    def _without_padding(self, keep_BL: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """This rank's tensors, batch first, with 0 at padding: see :func:`keys_without_padding`."""
        inputs = self.inputs
        shardings = (inputs.sharding, inputs.kv_sharding, inputs.kv_sharding)
        q_BlNH, k_BlGH, v_BlGH = (batch_first(x, s) for x, s in zip(inputs.tensors, shardings, strict=True))
        if keep_BL is None:
            return q_BlNH, k_BlGH, v_BlGH, None
        keep_Bl = _share(keep_BL, inputs.kv_sharding, inputs.rank)
        k_BlGH, v_BlGH = (keys_without_padding(x, keep_Bl) for x in (k_BlGH, v_BlGH))
        if inputs.lengths[0] != inputs.lengths[1]:
            return q_BlNH, k_BlGH, v_BlGH, None
        q_BlNH, lost_Bln1 = queries_without_padding(q_BlNH, _share(keep_BL, inputs.sharding, inputs.rank))
        return q_BlNH, k_BlGH, v_BlGH, lost_Bln1


def _share(x_BL: Tensor, sharding: TokenSharding, rank: int) -> Tensor:
    """(B, l) of a tensor that every rank has whole."""
    return batch_first(sharding.shard(in_order(x_BL, sharding), rank), sharding)
