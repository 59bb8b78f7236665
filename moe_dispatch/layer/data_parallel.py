"""What DistributedDataParallel must not touch: the experts of each rank, and its counts."""

from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .moe import MoE
from .share import MARK


def leave_experts_to_ranks(model: nn.Module) -> None:
    """Have ``DistributedDataParallel(model)`` leave alone what is each rank's own: the experts of every :class:`MoE`
    in the model, and the counts of their load. Without it, DistributedDataParallel copies the experts of one rank to
    all, and averages gradients of experts that are not the same. Call it before; what the model has told
    DistributedDataParallel to ignore stays ignored.

    Gradients of experts are sums already, over the tokens of the layer's group. Those of all other parameters
    become averages; let a communication hook sum them, or multiply the loss by the number of ranks and divide the
    gradients of experts by it.
    """
    before: Iterable[str] = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    names = set(before)
    for place, module in model.named_modules():
        if isinstance(module, MoE):
            prefix = f"{place}." if place else ""
            own = [
                f"experts.{name}" for name, _ in (*module.experts.named_parameters(), *module.experts.named_buffers())
            ]
            names.update(prefix + name for name in (*own, "load_E", "report"))
        elif MARK in vars(module):
            held = (*module.named_parameters(), *module.named_buffers())
            names.update(f"{place}.{name}" if place else name for name, _ in held)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
