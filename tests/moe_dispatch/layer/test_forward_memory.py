"""What a layer remembers of a forward until its recomputation: for each checkpoint its own, and nothing after it."""

import copy
import gc

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dispatch.layer.recompute import ForwardMemory
from moe_dispatch.testing import RankPool
from tests.support.dispatch.checkpoints import is_empty, recomputed
from tests.support.dispatch.moe import (
    Case,
)


def left_behind(rank: int, grad: bool) -> bool:
    """Whether nothing is remembered after many forwards without a backward: for want of references, as no garbage
    is collected.
    """
    case = Case(seq=(2, 1), experts=(2, 2))
    moe, (x_BlD, _, _) = case.layer(rank), case.shards(rank)
    gc.disable()
    try:
        for _ in range(100):
            with torch.set_grad_enabled(grad):
                recomputed(moe, x_BlD, case.sharding)
        return is_empty(moe._plans)
    finally:
        gc.enable()


@pytest.mark.parametrize("grad", [False, True])
def test_forwards_without_a_backward_leave_nothing_behind(grad: bool, rank_pool: RankPool) -> None:
    assert rank_pool.run(left_behind, 2, grad) == [True, True]


def test_a_checkpoint_that_hides_its_frame_is_refused() -> None:
    def pack(x: Tensor) -> Tensor:
        return x

    pack.__module__ = "torch.utils.checkpoint"
    memory: ForwardMemory[int] = ForwardMemory()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        pytest.raises(RuntimeError, match="checkpoints in a way that MoE does not know") as caught,
    ):
        memory.recall(lambda: 1)
    assert "leave MoE layers outside torch.utils.checkpoint, or use a torch version that" in str(caught.value)
    assert is_empty(memory)


def test_other_hooks_are_no_checkpoint() -> None:
    memory: ForwardMemory[int] = ForwardMemory()
    assert memory.recall(lambda: 1) == 1
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert memory.recall(lambda: 2) == 2
    with torch.autograd.graph.save_on_cpu():
        assert memory.recall(lambda: 3) == 3
    assert is_empty(memory)


def test_a_copied_memory_is_empty() -> None:
    memory: ForwardMemory[int] = ForwardMemory()
    x_D = torch.ones(3, requires_grad=True)
    made = []

    def forward(x_D: Tensor) -> Tensor:
        made.append(memory.recall(lambda: len(made)))
        return x_D.sin().cos()

    y_D = checkpoint(forward, x_D, use_reentrant=False)
    assert isinstance(y_D, Tensor)
    assert len(memory._made) == 1
    assert is_empty(copy.deepcopy(memory))
    y_D.sum().backward()
    assert made == [0, 0]
