"""What a plan of ``plan_dispatch`` itself costs, in both of its forms, with uniform routing: bytes that a rank gets.

By ids: every rank's message of ids. By counts: every rank's message of counts, and what is longer in each row that
comes, padding included. ``plan/counts/rule.py`` says which form is used, by the most rows that there can be; here are
the expected ones.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ... import Partition
from ...plan.counts.facts import message_bytes
from ...plan.counts.rule import counts_cost_less
from ...plan.ids.format import IdFormat
from .chances import needed_chances
from .config import Cluster, PlanConfig
from .predict import widths_of

MANY_RANKS = (64, 256, 1024)  # by ids, bytes grow with the ranks; by counts they hardly do


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBytes:
    """Of one number of ranks.

    Attributes:
        by_ids: bytes of ids that a rank gets.
        counts, riding: bytes of counts that it gets, and of numbers and ids beside rows.
        by_ids_ms, by_counts_ms: of these bytes, over the slower link.
        form: "by ids" or "by counts", which is used.
    """

    ranks: int
    by_ids: float
    counts: float
    riding: float
    by_ids_ms: float
    by_counts_ms: float
    form: str

    @property
    def by_counts(self) -> float:
        return self.counts + self.riding


def plan_bytes(configs: Iterable[PlanConfig]) -> Iterator[PlanBytes]:
    """For the ranks of each config and for many, with the rest of the first."""
    config, *others = configs
    for ranks in sorted({*MANY_RANKS, *(each.cluster.ranks for each in (config, *others))}):
        yield _of_ranks(config, ranks)


def _of_ranks(config: PlanConfig, ranks: int) -> PlanBytes:
    model, tokens, widths = config.model, config.load.tokens_per_rank, widths_of(config)
    experts = Partition.balanced(model.experts, ranks)
    chance_P = needed_chances(
        experts.sizes, num_choices=model.top_k, groups=model.groups, limited_groups=model.limited_groups
    )
    rows = tokens * sum(chance_P) * (ranks - 1) / ranks  # the mean over ranks
    by_ids = (ranks - 1) * IdFormat.of(model.top_k, model.experts).message_bytes(tokens)
    counts = (ranks - 1) * message_bytes(max(experts.sizes))
    riding = rows * (widths.riding_row(model.experts) - widths.weighted_row)
    return PlanBytes(
        ranks=ranks,
        by_ids=by_ids,
        counts=counts,
        riding=riding,
        by_ids_ms=_milliseconds(by_ids, config.cluster, ranks),
        by_counts_ms=_milliseconds(counts + riding, config.cluster, ranks),
        form="by counts" if counts_cost_less(ranks, model.top_k, model.experts) else "by ids",
    )


def _milliseconds(received: float, cluster: Cluster, ranks: int) -> float:
    """Of bytes from all other ranks alike. A latency is left out: both forms have as many collectives."""
    inside = received * (min(cluster.ranks_per_node, ranks) - 1) / max(ranks - 1, 1)
    return max(inside / cluster.intra_gb_s, (received - inside) / cluster.inter_gb_s) / 1e6
