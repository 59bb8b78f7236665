"""A plan on one rank of many, of which there is no other: what it computes, and how many bytes it gets.

All ranks are alike. So what comes is what this rank sends, with the experts of others in place of its own, and
nothing is exchanged.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from ... import DispatchMetadata, Partition, TokenSharding
from ...plan.counts.by_counts import ByCounts
from ...plan.counts.facts import message_bytes
from ...plan.counts.riding import RidingIndex
from ...plan.counts.rule import NUMBER_STEPS, riding_steps
from ...plan.ids.by_ids import ByIds
from ...plan.ids.format import NO_EXPERT, STEP, IdFormat
from ...plan.terms import Terms
from .config import PlanOfManyConfig
from .memory import allocator_in_force
from .results import Line, Traffic

FORMS = MappingProxyType({"by ids": ByIds(), "by counts": ByCounts()})


class OneOf(dist.ProcessGroup):
    """Rank 0 of a group without others."""

    def __init__(self, ranks: int) -> None:
        super().__init__(0, ranks)  # pyright: ignore[reportCallIssue]
        self.ranks = ranks

    def size(self) -> int:
        return self.ranks


class Arrived:
    def wait(self) -> None:
        """It has come."""


def arrives(out: Tensor, rows: Tensor, *_: object, **__: object) -> Arrived:
    """In place of the all-to-all: from each rank what was sent to it."""
    out.copy_(rows)
    return Arrived()


@dataclass(frozen=True, slots=True)
class OneOfMany:
    """The plans of a workload: Zipf's law has no place here, as ranks are alike."""

    config: PlanOfManyConfig

    @property
    def experts(self) -> Partition:
        return Partition.balanced(self.config.experts, self.config.ranks)

    def terms(self) -> Terms:
        """On a new sharding, which keeps nothing yet."""
        seq = Partition((self.config.tokens,) * self.config.ranks)
        return Terms(sharding=TokenSharding(batch=1, seq=seq), experts=self.experts, dim=1)

    def ids(self) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        scores_tE = torch.rand(self.config.tokens, self.config.experts, generator=draw)
        return scores_tE.topk(self.config.top_k).indices.unsqueeze(0)

    def told(self, plan: DispatchMetadata) -> Tensor:
        """What comes beside the rows: of each row sent, the choices on its rank's experts as choices on mine."""
        (told_tW,) = plan.row_index.rides
        told_SW = told_tW.index_select(0, plan.token_of_sent_S)
        ids = IdFormat.of(self.config.top_k, self.config.experts)
        id_SK = told_SW[:, NUMBER_STEPS:].view(ids.dtype)[:, : self.config.top_k]
        peers = torch.tensor([*range(1, self.config.ranks), 0])
        rank_of_sent_S = peers.repeat_interleave(torch.tensor(plan.rows_sent)[peers])
        first_S = torch.tensor(self.experts.offsets)[rank_of_sent_S].unsqueeze(1)
        of_rank_SK = id_SK - first_S
        size_S = torch.tensor(self.experts.sizes)[rank_of_sent_S].unsqueeze(1)
        id_SK.copy_(of_rank_SK.where((of_rank_SK >= 0) & (of_rank_SK < size_S), NO_EXPERT))
        return told_SW

    def received(self, name: str, plan: DispatchMetadata) -> int:
        """Bytes from other ranks, those beside rows included."""
        config, others = self.config, self.config.ranks - 1
        if name == "by ids":
            return others * IdFormat.of(config.top_k, config.experts).message_bytes(config.tokens)
        beside = riding_steps(config.top_k, config.experts) * STEP.itemsize * sum(plan.rows_from_others)
        return others * message_bytes(max(self.experts.sizes)) + beside


def measure_plans(config: PlanOfManyConfig, repeat: int) -> tuple[list[Line], tuple[str, ...]]:
    """A line for each form, and the allocator settings. ``forward_ms`` is processor time of a plan, ``both_ms`` of it
    and of what is made of the rows when they come, ``processor_ms`` of the first plan on a sharding."""
    many = OneOfMany(config)
    group, ids, lines = OneOf(config.ranks), many.ids(), list[Line]()
    with patch.object(dist, "all_to_all_single", arrives):
        for name, form in FORMS.items():
            cold = milliseconds(lambda form=form: form.plan(ids, None, many.terms(), group), 1)
            terms = many.terms()
            plan = form.plan(ids, None, terms, group)
            warm = milliseconds(lambda form=form, terms=terms: form.plan(ids, None, terms, group), repeat)
            finish = _milliseconds_of_rows(many, plan, repeat)
            lines.append(
                Line(
                    name=name,
                    forward_ms=tuple(warm),
                    both_ms=tuple(a + b for a, b in zip(warm, finish, strict=True)),
                    processor_ms=(tuple(cold),),
                    forward=Traffic(
                        collectives=1, wire_bytes=many.received(name, plan), all_ranks_bytes=0, host_syncs=1
                    ),
                )
            )
    return lines, allocator_in_force()


def _milliseconds_of_rows(many: OneOfMany, plan: DispatchMetadata, repeat: int) -> Sequence[float]:
    """Of what is made when rows have come; nothing where all was known before."""
    index = plan.row_index
    if not isinstance(index, RidingIndex):
        return [0.0] * repeat
    told_SW = many.told(plan)
    return milliseconds(lambda: RidingIndex(index.facts, index.num_rows, index.told_tW).came([told_SW]), repeat)


def milliseconds(call: Callable[[], object], repeat: int) -> list[float]:
    """Of the processor, in each repetition; what is freed is freed in it."""
    found = []
    gc.collect()
    for _ in range(repeat):
        start = time.process_time()
        call()
        found.append((time.process_time() - start) * 1e3)
    return found
