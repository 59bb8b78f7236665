"""float64 all the way. Transformers casts to float32 inside norms, routers, rotary embeddings and softmax, so that a
model in float64 alone is no sharper a check than one in float32."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class StrictFloat64(TorchFunctionMode):
    """Inside, what is asked for in float32 is made in float64. Of this thread only; no module is changed."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        named = {name: _wide(x) for name, x in (kwargs or {}).items()}
        return func(*map(_wide, args), **named)


def strict_where_float64(model: nn.Module) -> AbstractContextManager[Any]:
    """:class:`StrictFloat64` for a model in float64, nothing for another."""
    return StrictFloat64() if next(model.parameters()).dtype == torch.float64 else nullcontext()


def _wide(x: Any) -> Any:
    return torch.float64 if x is torch.float32 else x
