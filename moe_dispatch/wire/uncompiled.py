"""Functions that torch.compile does not trace: a graph break, where each batch would be another graph, or a constant.

``torch.compiler.disable`` and ``assume_constant_result`` say the same, but import the compiler (a second, in every
process that never compiles). This marks functions as they do, and calls them as they do.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch._C._dynamo import eval_frame

P = ParamSpec("P")
R = TypeVar("R")
AS_IT_IS = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)


def uncompiled(reason: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function, and what it calls, is not compiled, whatever calls it.

    Args:
        reason: what torch.compile says with ``fullgraph=True``, where a graph break is an error.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            before = eval_frame.set_eval_frame(None)
            try:
                return function(*args, **kwargs)
            finally:
                eval_frame.set_eval_frame(before)

        eval_frame.set_code_exec_strategy(run.__code__, AS_IT_IS)  # pyright: ignore[reportAttributeAccessIssue]
        vars(run).update(
            _torchdynamo_disable=True, _torchdynamo_disable_msg=reason, _torchdynamo_disable_recursive=True
        )
        return run

    return decorate


def constant_in_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: torch.compile calls the function while it traces, and keeps the result as a constant."""
    vars(function).update(_dynamo_marked_constant=True)
    return function
