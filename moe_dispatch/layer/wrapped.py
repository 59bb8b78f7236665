"""Experts in a data-parallel wrapper that cannot take them: each rank of a group has its own, or none."""

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def check_not_averaged(experts: nn.Module, group: dist.ProcessGroup) -> None:
    """Raise if the DistributedDataParallel around this forward takes the experts of several ranks of ``group`` for
    copies of each other. Every rank sees it by itself.

    Raises:
        ValueError: before any collective of this forward.
    """
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None:
        return
    of_ddp = {id(parameter) for parameter in ddp._module_parameters}
    if not any(id(parameter) in of_ddp for parameter in experts.parameters()):
        return
    alike = set(dist.get_process_group_ranks(ddp.process_group)) & set(dist.get_process_group_ranks(group))
    if len(alike) > 1:
        raise ValueError(
            f"DistributedDataParallel has given the experts of one rank to all of the ranks {sorted(alike)}, and "
            "would average their gradients; each rank of an expert-parallel group has experts of its own: call "
            "leave_experts_to_ranks(model) before DistributedDataParallel(model)"
        )


def is_sharded(experts: nn.Module) -> bool:
    """By FSDP2. Told by the name of its class: to import it takes 0.2 s."""
    return any(kind.__name__ == "FSDPModule" for kind in type(experts).__mro__)
