"""Where the fused kernels run."""

from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None


def runs_fused(*tensors: Tensor) -> bool:
    """Whether these have memory of their own on CUDA, and there is Triton (the extra ``triton``; torch's builds for
    CUDA bring it along)."""
    if not HAS_TRITON or not tensors[0].is_cuda:  # on the CPU, with no look at the others
        return False
    return all(x.is_cuda and type(x) is Tensor for x in tensors) and torch.version.cuda is not None


def launched() -> ModuleType:
    """The functions that launch them. Imported here, as they need Triton."""
    from . import launch

    return launch
