"""Weights so wide that every signal is of order one. Transformers draws with 0.02, in which routers, sinks and biases
hardly matter: a mistake in them would not show."""

from typing import Any

import torch
from torch import Tensor

SEED = 7
OF_NORMS, OF_BIASES, OF_MATRICES = 0.2, 0.3, 1.5
OF_CORRECTIONS = 0.05  # of routing: about as far as scores of neighbours are apart


@torch.no_grad()
def draw_wide(model: Any) -> None:
    """Draw all weights and saved buffers (corrections of routing among them) anew, the same on every rank."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    transposed = {
        f"{place}.{name}"
        for place, module in model.named_modules()
        if getattr(module, "is_transposed", False)
        for name, _ in module.named_parameters(recurse=False)
    }
    saved = model.state_dict()
    tensors = [*model.named_parameters(), *((name, x) for name, x in model.named_buffers() if name in saved)]
    for name, x in tensors:
        if x.is_floating_point():
            drawn = torch.randn(x.shape, generator=generator, device="cpu")
            x.copy_(_scaled(name, drawn, fan_in=x.shape[-2 if name in transposed else -1] if x.ndim > 1 else 1))
            if not x.requires_grad:  # a correction of routing, which is set by hand in training
                x.copy_(OF_CORRECTIONS * drawn)


def _scaled(name: str, drawn: Tensor, fan_in: int) -> Tensor:
    if "norm" in name:
        return 1 + OF_NORMS * drawn
    if drawn.ndim < 2 or name.endswith("bias"):
        return OF_BIASES * drawn
    if "embed" in name:
        return drawn
    return OF_MATRICES * fan_in**-0.5 * drawn
