"""float64 all the way: Transformers casts to float32 inside norms, routers, rotary embeddings and softmax, so that a
model in float64 is no sharper a check than one in float32."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .models import FAMILIES

CASTING = (
    "transformers.models.",
    "transformers.loss.",
    "transformers.modeling_rope_utils",
    "transformers.integrations.",
)


class _Float64:
    """torch, in which float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def strict_float64() -> Iterator[None]:
    """Nothing of Transformers casts a float64 tensor down, on any thread."""
    for family in FAMILIES:
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    proxy, before = _Float64(), Tensor.float
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(CASTING) and getattr(module, "torch", None) is torch
    ]
    for module in modules:
        module.torch = proxy  # type: ignore[attr-defined]
    Tensor.float = lambda x, *args, **kwargs: x if x.dtype == torch.float64 else before(x, *args, **kwargs)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.float = before  # type: ignore[method-assign]
        for module in modules:
            module.torch = torch  # type: ignore[attr-defined]
