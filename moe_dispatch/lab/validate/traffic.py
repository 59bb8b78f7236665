"""Where rows go: seen at the plans that a step makes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from ...plan.counts.by_counts import ByCounts
from ...plan.ids.by_ids import ByIds
from ...plan.metadata import DispatchMetadata


@contextmanager
def first_plan() -> Iterator[list[DispatchMetadata]]:
    """Gets the first counted plan that is made inside, if any is."""
    found: list[DispatchMetadata] = []

    def noting(plan: Callable[..., DispatchMetadata]) -> Callable[..., DispatchMetadata]:
        def noted(*args: Any) -> DispatchMetadata:
            made = plan(*args)
            if not found:
                found.append(made)
            return made

        return noted

    with ExitStack() as patches:
        for form in (ByIds, ByCounts):
            patches.enter_context(patch.object(form, "plan", noting(form.plan)))
        yield found


def rows_of_every_rank(plan: list[DispatchMetadata]) -> tuple[tuple[int, ...], ...]:
    """Rows from each rank to each rank, of the plans of :func:`first_plan`; 0 where there is none. Collective."""
    counts = [0] * dist.get_world_size()
    for made in plan:
        for rank, count in zip(dist.get_process_group_ranks(made.group), made.rows_sent, strict=True):
            counts[rank] = count
    of_every_rank: list[list[int]] = [[]] * len(counts)
    dist.all_gather_object(of_every_rank, counts)
    return tuple(map(tuple, of_every_rank))
