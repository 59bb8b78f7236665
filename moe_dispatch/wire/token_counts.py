"""The sharding of ranks that know their own tokens only."""

import torch
import torch.distributed as dist

from ..layout.partition import Partition, check_count
from ..layout.sharding import TokenSharding
from .agreement import BAD, Statement
from .devices import carries, device_for
from .exchange import check_is_group, exchange_rows


def gather_sharding(num_tokens: int, *, device: torch.device, group: dist.ProcessGroup) -> TokenSharding:
    """The tokens of a group in which each rank knows its own number only: data-parallel ranks whose batches have
    different shapes, or tokens that were picked out. One exchange of 8 bytes per pair of ranks, and one host sync:
    ask once per step, and give all layers the same sharding.

    Nothing is left of rows and positions: the tokens of all ranks are one row, rank after rank. So a rank passes
    (1, t, D), ``x_blD.flatten(0, 1).unsqueeze(0)``, and views what it gets back in its own shape. Who knows all
    numbers makes the same without asking: ``TokenSharding(batch=1, seq=Partition(counts))``. Positions and
    :func:`sequence_balance_loss` need sequences, so a sharding of those.

    Args:
        num_tokens: t, of this rank; 0 is ordinary.
        device: that the group communicates on.
        group: the expert-parallel process group.

    Returns:
        A grid of 1 x T tokens, of which rank r holds t_r; equal on every rank.

    Raises:
        RankMistakeError: on every rank, naming the rank whose number is no int of at least 0, or whose device is one
            on which the group does not communicate.
    """
    check_is_group(group)
    problem = ""
    try:
        check_count(num_tokens, "num_tokens", least=0)
    except ValueError as error:
        problem = str(error)
    if not carries(group, device):
        problem = problem or f"device is {device}, where the group does not communicate"
        device = device_for([], group)
    ones = (1,) * group.size()
    count_P = torch.full((group.size(),), BAD if problem else num_tokens, dtype=torch.int64, device=device)
    counts = exchange_rows(count_P, ones, ones, group).tolist()
    if BAD in counts:
        Statement("", problem).raise_on_every_rank(device=device, group=group)
    return TokenSharding(batch=1, seq=Partition(counts))
