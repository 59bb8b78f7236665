"""What ``attend`` can be told: the names of its arguments, through whatever wraps it."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

FIRST_HEAD = "first_head"


def takes(attend: Callable[..., Tensor], name: str) -> bool:
    """Whether it has an argument of that name, or takes all names.

    Raises:
        TypeError, ValueError: its arguments cannot be seen.
    """
    parameters = inspect.signature(signed(attend)).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return True
    return name in parameters and parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY


def signed(attend: Any) -> Any:
    """What has the arguments of ``attend``. A call of a module takes anything; its ``forward`` does not."""
    if isinstance(attend, partial):
        return partial(signed(attend.func), *attend.args, **attend.keywords)
    if isinstance(attend, nn.Module):
        compiled = getattr(attend, "_orig_mod", None)  # what torch.compile(module) wraps
        return attend.forward if compiled is None else signed(compiled)
    return attend
