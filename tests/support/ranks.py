"""What tests do on a rank: name the default group, and read the text of a refusal."""

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
