"""Whether a forward belongs to a training step, or only learns shapes."""

import sys
from types import FrameType

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from .recompute import in_backward

REENTRANT_FORWARD = CheckpointFunction.forward.__code__
METADATA_PASS = ("torch.distributed.pipelining.stage", "_forward_metadata_inference")


def only_learns_shapes(module: nn.Module) -> bool:
    """Training mode is not enough: torch.distributed.pipelining runs each stage once before the first step, on
    tensors that nobody filled. Without gradients nothing is trained either, but in the forward of a reentrant
    checkpoint, which its backward runs again. Nothing but the callers tells which it is."""
    if not module.training:
        return False
    without_gradients, frame = not torch.is_grad_enabled(), sys._getframe()
    while frame is not None:
        if _is_metadata_pass(frame):
            return True
        if frame.f_code is REENTRANT_FORWARD:
            without_gradients = False
        frame = frame.f_back
    return without_gradients


def is_counted(module: nn.Module) -> bool:
    """A pass of a training step, and no recomputation."""
    return module.training and not in_backward() and not only_learns_shapes(module)


def _is_metadata_pass(frame: FrameType) -> bool:
    return (frame.f_globals.get("__name__"), frame.f_code.co_name) == METADATA_PASS
