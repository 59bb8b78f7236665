"""What a plan of ``plan_dispatch`` itself costs, in both of its forms: bytes that a rank gets from others.

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
from .config import PlanConfig
from .predict import Prediction, widths_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBytes:
    """Of one number of ranks, for uniform routing.

    Attributes:
        by_ids: bytes of ids that a rank gets.
        counts, riding: bytes of counts that it gets, and of numbers and ids beside rows.
        form: "by ids" or "by counts", which is used.
    """

    ranks: int
    by_ids: float
    counts: float
    riding: float
    form: str

    @property
    def by_counts(self) -> float:
        return self.counts + self.riding


def plan_bytes(configs: Iterable[PlanConfig], predictions: Iterable[Prediction]) -> Iterator[PlanBytes]:
    """For each config, with the rows that the predictions have for it."""
    rows_of_ranks = {
        each.ranks: each.rows_sent
        for each in predictions
        if (each.routing, each.scheme) == ("uniform", "row per rank")
    }
    for config in configs:
        model, ranks, widths = config.model, config.cluster.ranks, widths_of(config)
        most_experts = max(Partition.balanced(model.experts, ranks).sizes)
        by_counts = counts_cost_less(ranks, model.top_k, model.experts)
        yield PlanBytes(
            ranks=ranks,
            by_ids=(ranks - 1) * IdFormat.of(model.top_k, model.experts).message_bytes(config.load.tokens_per_rank),
            counts=(ranks - 1) * message_bytes(most_experts),
            riding=rows_of_ranks[ranks] * (widths.riding_row(model.experts) - widths.weighted_row),
            form="by counts" if by_counts else "by ids",
        )
