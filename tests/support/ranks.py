"""What tests do on a rank: name the default group, and read the text of a refusal."""

import time
from collections.abc import Callable

import pytest
import torch.distributed as dist


def world() -> dist.ProcessGroup:
    """The default group of this rank."""
    group = dist.group.WORLD
    assert group is not None
    return group


def refusal(call: Callable[[], object]) -> str:
    """The text of the ValueError that ``call`` has to raise. The caller compares it."""
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the caller compares the whole text)
        call()
    return str(error.value)


def comes_true(fact: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it is true soon. For what dies with the last exchange: a thread of gloo lets go of the tensors of an
    exchange, and so of their graph, some time after the exchange was waited for. Measured: 1 ms on a busy machine.
    """
    deadline = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
