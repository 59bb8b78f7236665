"""Where tensors wait that are needed later."""

import torch
from torch import Tensor


def away(x: Tensor, offload: bool) -> Tensor:
    """``x`` as it waits: itself, or a copy in the memory of the host, which the device need not wait for. On the CPU
    that is a copy for nothing."""
    if not offload:
        return x
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.device.type == "cuda")
    return out.copy_(x, non_blocking=True)


def back(x: Tensor, device: torch.device) -> Tensor:
    """What :func:`away` gave, on its device again. Copies run in the order of the stream that both are made on."""
    return x.to(device, non_blocking=True)
