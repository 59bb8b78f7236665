"""Which tensors of a state dict are experts, and of which layer."""

from torch import Tensor, nn

from ..layer.share import ExpertLayer
from .parameters import tensors_of_experts


def experts_of_state(model: nn.Module) -> dict[str, ExpertLayer]:
    """The layer of every tensor of experts, by its name in ``model.state_dict()``. No communication.

    Told by the tensors themselves: names in a state dict are not always those of the modules.

    Raises:
        ValueError: experts that are not stacked in the first dimension, so that nobody knows which number is whose.
    """
    moe_of_tensor = {id(tensor): moe for moe, tensor in tensors_of_experts(model)}
    found: dict[str, ExpertLayer] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        moe = moe_of_tensor.get(id(value)) if isinstance(value, Tensor) else None
        if moe is not None:
            mine = moe.partition.sizes[moe.group.rank()]
            if not is_stacked(value, mine):
                raise ValueError(
                    f"{name} is {tuple(value.shape)} in a layer with {mine} experts on this rank; each parameter and "
                    "buffer of experts has to have one entry per expert in dimension 0, as those of GroupedExperts"
                )
            found[name] = moe
    return found


def is_stacked(value: object, num_experts: int) -> bool:
    """Has it one entry per expert in dimension 0?"""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == num_experts
