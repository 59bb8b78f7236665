"""Where a group communicates."""

import torch
import torch.distributed as dist


def device_of(group: dist.ProcessGroup) -> torch.device:
    """One that ``group`` communicates on; the CPU where it can, so that nothing waits for the device."""
    backend = dist.get_backend(group)
    accelerator = torch.accelerator.current_accelerator()
    on_cpu = backend in ("gloo", "mpi") or "cpu:" in backend
    return torch.device("cpu") if on_cpu or accelerator is None else accelerator
