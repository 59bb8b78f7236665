"""A call of attention over ranks that all of them mean: its work, and how it is computed.

First every rank says what it believes about the call, in a message whose size depends on nothing. So whatever one
rank has wrong is the same error on all, before rows travel whose number depends on it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import TokenSharding
from moe_dispatch.internals import Statement

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
from ..work.scheme import Keys, Scheme, problem_of_scheme
from .attend_arguments import FIRST_HEAD, takes
from .call_inputs import Inputs
from .options import (
    Given,
    facts_of_call,
    options_of_my_heads,
    options_of_part,
    problem_of_attend,
    problem_of_options,
    seed_of,
)
from .outcome import Attend, RecomputedSoFar, output_or_problem
from .words import words_first

InputsT = TypeVar("InputsT", bound=Inputs)
TILE = 512  # queries and keys that are computed at once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asking:
    """What a rank was asked for, beside its tensors.

    Attributes:
        scheme, attend, group: as the caller gave them.
        given: the options.
        cu_seqlens, cu_seqlens_padded: of the documents, if there are any.
    """

    scheme: Scheme
    attend: Attend | None
    group: dist.ProcessGroup
    given: Given
    cu_seqlens: Tensor | None
    cu_seqlens_padded: Tensor | None

    def of_all_ranks(self, make_inputs: Callable[[], InputsT], device: torch.device) -> "Call[InputsT]":
        """Make sure that all ranks mean the same call, before rows travel whose number depends on it. One collective.

        Args:
            make_inputs: of this rank's tensors; it may raise a ValueError.
            device: where this rank's words are made.

        Raises:
            ValueError: the same text on every rank, as :func:`words_first`.
        """
        inputs = documents = cause = None
        facts = problem = ""
        try:
            if problem := problem_of_scheme(self.scheme, self.group.size()):
                raise ValueError(problem)
            inputs = make_inputs()
            documents, problem = Documents.read(
                self.cu_seqlens, self.cu_seqlens_padded, inputs.sharding.batch.total, inputs.lengths
            )
            problem = inputs.problem or problem_of_options(self.given, inputs) or problem or self._problem()
            whose = "tiles" if self.attend is None else "attend of the caller's"
            facts = "" if problem else f"{facts_of_call(inputs, self.given, documents)}; {self.scheme}, {whose}"
        except ValueError as error:
            problem = f"{error}"
        except Exception as error:  # of whatever kind: the peers wait for a word of this rank
            problem, cause = f"reading the call raised {type(error).__name__}: {error}", error
        seed = words_first(Statement(facts, problem, cause), seed_of(self.given, device), self.group)
        if inputs is None or problem:  # where words are not read: see check_words
            raise ValueError(problem) from cause
        return Call(inputs, self.given, documents, seed)

    def _problem(self) -> str:
        """What is wrong with an ``attend`` of the caller's in this scheme; empty where nothing is."""
        if self.attend is None:
            return ""
        if self.scheme.keys is Keys.RING:
            return (
                "attend with ring keys, which come in turns, so that no call of it would see all keys of a query; "
                "use gathered keys, or leave attend out"
            )
        if self.scheme.is_bounded:
            return f"attend in a scheme with chunk {self.scheme.chunk}: keys come in chunks; leave one of the two out"
        return problem_of_attend(self.attend, self.given)


def work_of(inputs: Inputs, given: Given, documents: Documents | None, *, at_once: bool) -> RankWork:
    """What this rank computes, and which rows it needs and sends."""
    value = {option.name: value for option, value in given}
    queries, keys = inputs.lengths
    spans = ((0, queries, 0, keys),)
    if documents is not None:
        spans = tuple((start, end, start, end) for start, end in documents.spans)
    asked = Asked(
        scheme=inputs.scheme,
        heads=inputs.heads,
        key_heads=inputs.key_heads,
        at_once=at_once,
        kv_sharding=inputs.kv_sharding,
        spans=spans,
        sides=sides_of("is_causal" in value, value.get("window")),
    )
    return rank_work(inputs.sharding, inputs.rank, asked)


@dataclass(frozen=True, slots=True, eq=False)
class Call(Generic[InputsT]):
    """A call that all ranks mean: what is left is to compute it.

    Attributes:
        inputs: the tensors.
        given: the options.
        documents: where they lie, if there are any.
        seed: of the group's first rank.
    """

    inputs: InputsT
    given: Given
    documents: Documents | None
    seed: Tensor

    def in_tiles(self) -> Tensor:
        inputs, value = self.inputs, self._values()
        q_BlNH, keys, lost_Bln1 = self._without_padding(value.get("key_padding_mask"))
        p, mask, chunk = value.get("dropout_p"), value.get("attn_mask"), min(TILE, inputs.scheme.chunk)
        options = Options(
            scale=value.get("scale", q_BlNH.shape[3] ** -0.5),
            attn_mask=None,
            key_padding_mask=value.get("key_padding_mask"),
            dropout=None if p is None else Dropout(p=p, seed=self.seed, first_head=inputs.first_head),
            chunk=chunk,
        )
        spread = Spread(
            mine=work_of(inputs, self.given, self.documents, at_once=False),
            group=inputs.group,
            options=options,
            value_width=inputs.value_width,
            source=inputs.source(chunk),
        )
        mask = None if mask is None else mask[(None,) * (4 - mask.ndim)]
        out_BlNH = attend_spread(spread, q_BlNH, keys, inputs.weights, mask, value.get("sinks_N"))
        return in_order(with_lost_queries(out_BlNH, lost_Bln1), inputs.sharding)

    def by_attend(self, attend: Attend) -> Tensor:
        """Whole keys come to ``attend``, and its output goes home, under autograd."""
        inputs = self.inputs
        mine = work_of(inputs, self.given, self.documents, at_once=True)
        q_BlNH, keys, lost_Bln1 = self._without_padding(self._values().get("key_padding_mask"))
        q_BLnH, *keys = tensors_to_work(mine, inputs.group, q_BlNH, *keys)
        options = options_of_my_heads(self.given, inputs, self.seed)
        firsts = {FIRST_HEAD: inputs.first_head, FIRST_QUERY: 0, FIRST_KEY: 0}
        options |= {name: first for name, first in firsts.items() if takes(attend, name)}

        def attend_whole() -> Tensor:
            k_BLgH, v_BLgH = (inputs.heads.kv_for_queries(x, inputs.head_rank) for x in inputs.keys_and_values(keys))
            calls = parts(mine.work.seen, mine.query_turns[0].rows, mine.key_turns[0].rows)
            return attend_parts(attend, q_BLnH, k_BLgH, v_BLgH, options, calls, options_of_part)

        out_BLnH, statement = output_or_problem(attend_whole, q_BLnH, inputs.value_width)
        words_first(statement, torch.zeros_like(self.seed), inputs.group)
        out_BlNH = output_home(mine, inputs.group, RecomputedSoFar.apply(out_BLnH), q_BlNH)  # type: ignore[arg-type]
        return in_order(with_lost_queries(out_BlNH, lost_Bln1), inputs.sharding)

    def _values(self) -> dict[str, Any]:
        return {option.name: value for option, value in self.given}

    def _without_padding(self, keep_BL: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """This rank's tensors, batch first, with 0 at padding: see :func:`keys_without_padding`."""
        inputs = self.inputs
        q_BlNH = batch_first(inputs.tensors[0], inputs.sharding)
        keys = [batch_first(x, inputs.kv_sharding) for x in inputs.tensors[1:]]
        if keep_BL is None:
            return q_BlNH, keys, None
        keep_Bl = _share(keep_BL, inputs.kv_sharding, inputs.rank)
        keys = [keys_without_padding(x, keep_Bl) for x in keys]
        if inputs.lengths[0] != inputs.lengths[1]:
            return q_BlNH, keys, None
        q_BlNH, lost_Bln1 = queries_without_padding(q_BlNH, _share(keep_BL, inputs.sharding, inputs.rank))
        return q_BlNH, keys, lost_Bln1


def _share(x_BL: Tensor, sharding: TokenSharding, rank: int) -> Tensor:
    """(B, l) of a tensor that every rank has whole."""
    return batch_first(sharding.shard(in_order(x_BL, sharding), rank), sharding)
