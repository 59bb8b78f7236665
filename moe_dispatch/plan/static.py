"""A plan whose sizes are fixed beforehand, so that nothing waits for the device: for CUDA graphs.

Between each two ranks travel ``rows_per_pair`` rows, and each rank's experts get ``rows`` rows, used or not. An
unused row belongs to no expert and to no token's sum; it holds zeros, and so does its gradient. Every rank knows all
choices, so each sees by itself whether the sizes are enough for all: where not, or where a rank has a problem, the
outputs of all ranks are NaN, and :meth:`StaticPlan.check` says why.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.partition import Partition, check_count
from ..layout.sharding import TokenSharding
from ..wire.agreement import BAD
from .checks import check_plan, problem_of_arguments, status_word
from .counted import DispatchMetadata
from .group_tokens import Grid
from .ids_exchange import RoutingExchange
from .row_index import Arrivals, Departures
from .static_index import StaticSizes, index_arrivals, index_departures, needed_sizes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StaticPlan(DispatchMetadata):
    """A plan of fixed sizes. Made by :func:`plan_static`; :func:`dispatch` and :func:`combine` take it as any other.

    Where a row is unused, ``token_of_row_M`` is -1; ``rows_per_expert_e`` counts the used rows, which come first.

    Attributes:
        sizes: rows between each two ranks, and rows of each rank's experts.
        report_P2: on the device, the same on every rank: the status words of all ranks, then the sizes that would
            have been enough.
        doubt: () float32 on the device: 0, or NaN where the report tells of a problem.
    """

    sizes: StaticSizes
    report_P2: Tensor
    doubt: Tensor = field(compare=False)  # NaN is not equal to itself; the report says as much

    @property
    def spare(self) -> int:
        """The row of zeros that unused rows are copies of."""
        return 1

    def checked(self, y_tD: Tensor) -> Tensor:
        """The sums of this rank's tokens, without those of unused entries; NaN where the report tells of a
        problem."""
        return y_tD[: self.num_tokens] + self.doubt.to(y_tD.dtype)

    def check(self) -> None:
        """Raise ValueError, the same on every rank, if rows did not fit or a rank had a problem.

        It waits for the device: call it outside of what is captured, e.g. after each step.
        """
        *words, of_pair, of_rank = self.report_P2.tolist()
        bad = [rank for rank, word in enumerate(words) if word == BAD]
        problems = [f"rank {rank} has expert ids out of range or NaN weights" for rank in bad]
        first_rank_of_word = {word: rank for rank, word in reversed(list(enumerate(words))) if word != BAD}
        if len(first_rank_of_word) > 1:
            ranks = " and ".join(map(str, sorted(first_rank_of_word.values())))
            problems.append(f"ranks {ranks} disagree about K, dim, dtype, sizes, sharding or experts")
        if of_pair > self.sizes.rows_per_pair:
            problems.append(
                f"{of_pair} tokens of one rank go to one rank, but rows_per_pair is {self.sizes.rows_per_pair}; plan "
                "with more (the tokens of the largest shard are always enough)"
            )
        if of_rank > self.sizes.rows:
            problems.append(
                f"{of_rank} choices fall on the experts of one rank, but rows is {self.sizes.rows}; plan with more"
            )
        if problems:
            raise ValueError("a plan of fixed sizes did not hold, and its outputs are NaN: " + "; ".join(problems))


@torch.no_grad()
def plan_static(
    expert_BlK: Tensor,
    *,
    dim: int,
    sharding: TokenSharding,
    experts: Partition,
    group: dist.ProcessGroup,
    sizes: StaticSizes,
    weight_BlK: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> StaticPlan:
    """:func:`plan_dispatch` with sizes that do not depend on the ids. One collective and no copy to the host, so that
    it can be captured in a CUDA graph, together with ``dispatch``, experts that do not wait for the device,
    ``combine``, and their backward. What the sharding keeps is made in the warm-up before the capture.

    Args:
        expert_BlK, dim, sharding, experts, group, weight_BlK, dtype: as in :func:`plan_dispatch`.
        sizes: the same on every rank.

    Raises:
        ValueError: what a rank can see of its own arguments without a look at the device, on that rank only. The rest
            is told by :meth:`StaticPlan.check`, and by outputs that are NaN, on every rank.
    """
    check_plan(dim, sharding, experts, group)
    for name, size in (("rows_per_pair", sizes.rows_per_pair), ("rows", sizes.rows)):
        check_count(size, name, least=1)
    rank = group.rank()
    if problem := problem_of_arguments(expert_BlK, weight_BlK, sharding, rank):
        raise ValueError(f"rank {rank}: {problem}")
    num_choices = expert_BlK.shape[2]
    grid = Grid.of(
        sharding,
        experts,
        rank=rank,
        num_choices=num_choices,
        dim=dim,
        device=expert_BlK.device,
        dtype=dtype,
        also=f"{sizes}",
    )
    wanted_tK = expert_BlK.flatten(0, 1) + 1
    id_tK = wanted_tK.clamp(0, experts.total)
    exchange = RoutingExchange.start(id_tK, status_word(wanted_tK, id_tK, weight_BlK, grid.expected), grid, group)
    departures = index_departures(Departures.of(id_tK, grid), sizes)
    id_GK, word_P = exchange.wait()
    needed_2 = needed_sizes(id_GK, grid)
    problem = (word_P != grid.expected).any() | (needed_2[0] > sizes.rows_per_pair) | (needed_2[1] > sizes.rows)
    return StaticPlan(
        local_shape=(*sharding.local_shape(rank), dim),
        sharding=sharding,
        experts=experts,
        rank=rank,
        group=group,
        rows_sent=(sizes.rows_per_pair,) * len(experts),
        rows_received=(sizes.rows_per_pair,) * len(experts),
        expert_BlK=expert_BlK.clone(),
        sizes=sizes,
        report_P2=torch.cat([word_P, needed_2]),
        doubt=torch.zeros((), device=word_P.device).masked_fill_(problem, torch.nan),
        **departures,
        **index_arrivals(Arrivals.of(id_GK, grid).mine_GK, grid, sizes),
    )
