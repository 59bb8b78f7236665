"""What can be wrong with a batch before it is cut; a ValueError each."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch.internals import device_for, is_dtensor, problem_of_devices

from ..dtypes import is_integer
from .batch import Batch

TENSORS_OF_TOKENS = ("token_BL", "target_BL", "loss_mask_BL", "position_BL", "attention_mask")
TENSORS = (*TENSORS_OF_TOKENS, "cu_seqlens", "cu_seqlens_padded")


def check_types(batch: Batch) -> None:
    """Of all but the documents, which have their own reader."""
    if not isinstance(batch, Batch):
        raise ValueError(f"batch is {type(batch).__name__}; it has to be a Batch")
    for name in TENSORS_OF_TOKENS:
        value = getattr(batch, name)
        if not isinstance(value, Tensor) and (value is not None or name == "token_BL"):
            raise ValueError(f"{name} is {type(value).__name__}; it has to be a tensor")
    if not isinstance(batch.ignore_index, int):
        raise ValueError(f"ignore_index is {batch.ignore_index!r}; it has to be an int")
    if not isinstance(batch.fields, Mapping):
        raise ValueError(
            f"fields is {type(batch.fields).__name__}; it has to be a dict of (B, L, ...) tensors by name"
        )
    for name, value in batch.fields.items():
        if not isinstance(name, str):
            raise ValueError(f"fields has the name {name!r}; it has to be a text")
        if not isinstance(value, Tensor):
            raise ValueError(f"fields[{name!r}] is {type(value).__name__}; it has to be a tensor (B, L, ...)")
    tensors = {name: getattr(batch, name) for name in TENSORS}
    for name, value in (tensors | {f"fields[{name!r}]": x for name, x in batch.fields.items()}).items():
        if is_dtensor(value):
            raise ValueError(
                f"{name} is a DTensor; shard_batch cuts ordinary tensors of the whole batch: pass its .to_local() if "
                "each rank has the whole, else its .full_tensor()"
            )


def device_of(batch: Batch, group: dist.ProcessGroup) -> torch.device:
    """Where the peers expect this rank's words: where its batch is, if the group communicates there."""
    return device_for((getattr(batch, name, None) for name in TENSORS_OF_TOKENS), group)


def check_devices(batch: Batch, group: dist.ProcessGroup) -> None:
    """Of all but the documents, which are read on the CPU."""
    tensors = {name: getattr(batch, name) for name in TENSORS_OF_TOKENS}
    fields = {f"fields[{name!r}]": x for name, x in batch.fields.items()}
    if problem := problem_of_devices(group, **tensors, **fields):
        raise ValueError(problem)


def check_shapes(batch: Batch, shape: tuple[int, int]) -> None:
    """Of all that is cut: (B, L) is ``shape``."""
    names = ("token_BL", "target_BL", "loss_mask_BL", "position_BL")
    fields = {name: x for name in names if (x := getattr(batch, name)) is not None}
    for name, x in fields.items():
        dims = (2, 3) if name == "position_BL" else (2,)
        if x.ndim not in dims or tuple(x.shape[-2:]) != shape:
            raise ValueError(
                f"{name} is {tuple(x.shape)}; it has to be (B, L) = {shape}, batch first for either order"
                + ", or that after a first dimension" * (name == "position_BL")
            )
        if name != "loss_mask_BL" and not is_integer(x):
            raise ValueError(f"{name} is {x.dtype}; it has to be ints")
    for name, x in batch.fields.items():
        if tuple(x.shape[:2]) != shape:
            raise ValueError(
                f"fields[{name!r}] is {tuple(x.shape)}; it has to be (B, L, ...) with (B, L) = {shape}, batch "
                "first for either order"
            )
    mask = batch.loss_mask_BL
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("loss_mask_BL holds more than 0 and 1; weigh losses per token and pass them to mean_loss")
