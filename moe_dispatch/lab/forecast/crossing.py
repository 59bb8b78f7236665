"""From how many ranks on another way to plan would cost less.

``plan_dispatch`` sends the ids of a rank's tokens to every rank. The other way sends a word and a count to every rank
first, and then, with each row, its token's number (8 bytes) and ids.
"""

from dataclasses import dataclass

from ... import Partition
from ...plan.ids.format import IdFormat
from .chances import needed_chances
from .config import MOST_RANKS, PlanConfig
from .traffic import COUNT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """From how many ranks on the other way costs less, for uniform routing; None: not up to ``MOST_RANKS``.

    Attributes:
        ranks_by_bytes: comparing bytes that leave a rank.
        ranks_by_time: comparing time over the links, with the latency of one more collective.
    """

    ranks_by_bytes: int | None
    ranks_by_time: int | None


def find_crossing(config: PlanConfig) -> Crossing:
    """Compare the two ways for 2 ranks, 3 ranks and so on; above one node, for whole nodes."""
    model, load, cluster = config.model, config.load, config.cluster
    ids = IdFormat.of(model.top_k, model.experts)
    by_bytes = by_time = None
    in_node = cluster.ranks_per_node
    for ranks in (*range(2, in_node), *range(in_node, MOST_RANKS + 1, in_node)):
        needed = needed_chances(
            Partition.balanced(model.experts, min(ranks, model.experts)).sizes,  # no token needs the other ranks
            num_choices=model.top_k,
            groups=model.groups,
            limited_groups=model.limited_groups,
        )
        rows = load.tokens_per_rank * sum(needed) / ranks  # to one rank, in the mean
        message, word = ids.message_bytes(load.tokens_per_rank), ids.message_bytes(0)
        ids_of_token = (message - word) / load.tokens_per_rank
        counts_first = word + COUNT_BYTES + rows * (ids_of_token + COUNT_BYTES)
        inside, outside = min(ranks, in_node) - 1, ranks - min(ranks, in_node)
        seconds_per_byte = max(inside / (1e9 * cluster.intra_gb_s), outside / (1e9 * cluster.inter_gb_s))
        if by_bytes is None and message > counts_first:
            by_bytes = ranks
        if (message - counts_first) * seconds_per_byte > 1e-6 * cluster.latency_us:
            by_time = ranks
            break
    return Crossing(ranks_by_bytes=by_bytes, ranks_by_time=by_time)
