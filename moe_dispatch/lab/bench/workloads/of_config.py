"""The workload of a config, and the tensors that a contender gets."""

from collections.abc import Callable

import torch.distributed as dist

from .... import TokenSharding
from ..config import AttentionConfig, DispatchConfig, ExchangeConfig
from ..contenders.protocol import Made
from .attention import AttentionWorkload
from .case import Case
from .dispatch import DispatchWorkload
from .exact import exact_attention
from .ulysses import UlyssesWorkload

Workload = DispatchWorkload | UlyssesWorkload | AttentionWorkload


def workload_of(config: ExchangeConfig) -> Workload:
    """What its tables say, as values that every rank has."""
    if isinstance(config, DispatchConfig):
        return DispatchWorkload.of(config)
    return AttentionWorkload.of(config) if isinstance(config, AttentionConfig) else UlyssesWorkload.of(config)


def cases_of(workload: Workload, group: dist.ProcessGroup) -> Callable[[Made], Case]:
    """This rank's tensors for a contender: in attention those of its ``sharding``, else the same for all.

    Every rank of ``group`` calls it: what attention has to give is computed by all together.
    """
    rank = group.rank()
    if not isinstance(workload, AttentionWorkload):
        case = workload.case(rank)
        return lambda contender: case
    exact, of_sharding = exact_attention(workload, group), dict[TokenSharding, Case]()

    def case_of(contender: Made) -> Case:
        sharding = getattr(contender, "sharding", workload.sharding)
        if sharding not in of_sharding:
            of_sharding[sharding] = workload.case(rank, sharding, exact)
        return of_sharding[sharding]

    return case_of
