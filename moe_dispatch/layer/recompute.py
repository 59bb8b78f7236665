"""Keep what a checkpointed forward decided, for its recomputation.

``torch.utils.checkpoint(use_reentrant=False)`` runs a region again in backward. Routing must not be decided again
there: a tie that falls the other way on one rank gives ranks different plans, which is a hang or wrong rows. PyTorch
has no public way to ask "which forward is being recomputed?"; the answer is the checkpoint's frame, which its
saved-tensor hooks hold. Where the innermost hooks are a checkpoint's and hold no frame, we refuse rather than decide
again. Other hooks around the layer (``save_on_cpu``) hide those of the checkpoint: there tokens are routed again, on
all ranks alike, and only a router that decides alike gives the same.

A reentrant checkpoint has no hooks. Its forward runs without gradients, and its backward runs it again with them.
Both are called with one ``ctx``, which lives as long as the graph. We look for the two functions among our callers.
The plan is made again, since the forward agreed about no gradients, with the experts that the forward chose.
"""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch.utils import checkpoint

from .training_pass import REENTRANT_FORWARD, callers

T = TypeVar("T")
REENTRANT_BACKWARD = checkpoint.CheckpointFunction.backward.__code__


def in_backward() -> bool:
    """Is autograd running backward on this thread?"""
    return torch._C._current_graph_task_id() != -1


class ForwardMemory(Generic[T]):
    """What each checkpointed forward made, for as long as its graph lives.

    Frames are held weakly: a forward whose graph is dropped without a backward leaves nothing behind.
    """

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[Any, list[T]] = WeakKeyDictionary()
        self._recalled: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ForwardMemory, ()  # a copied or loaded module has no forwards to remember

    def recall(self, make: Callable[[], T]) -> T:
        """``make()``; in a recomputation, what the same call of the forward made."""
        pack_hook = _checkpoint_hook()
        if pack_hook is None:
            return make()
        frame, recomputing = _frame_of(pack_hook)
        made = self._made.setdefault(frame, [])
        if not recomputing:
            if in_backward():
                raise RuntimeError(
                    "an MoE layer inside a checkpoint inside a checkpoint: the recomputation of the outer one would "
                    "route its tokens again; checkpoint the block or its parts, not both"
                )
            made.append(make())
            return made[-1]
        # Each recomputation has a hook of its own, so calls are counted anew in each.
        call = self._recalled.get(pack_hook, 0)
        self._recalled[pack_hook] = call + 1
        return made[call]

    def is_recalling(self) -> bool:
        """Whether a forward that made something is recomputed here."""
        pack_hook = _checkpoint_hook()
        if pack_hook is None:
            return False
        frame, recomputing = _frame_of(pack_hook)
        return recomputing and frame in self._made


class ReentrantMemory(Generic[T]):
    """What each call in the forward of a reentrant checkpoint made, in order, for as long as its graph lives."""

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[Any, deque[T]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ReentrantMemory, ()  # a copied or loaded module has no forwards to remember

    def recall(self, make: Callable[[], T]) -> T:
        """``make()``; where a checkpoint runs a forward again, what the same call of that forward made."""
        if torch.is_grad_enabled() and not in_backward():
            return make()
        inside, again = _reentrant_checkpoints()
        # A recomputation makes all the calls of its forward, in their order, and there may be several.
        made = next((self._made[ctx] for ctx in again if ctx in self._made), deque[T]())
        value = made[0] if made else make()
        made.rotate(-1)
        for ctx in inside:
            self._made.setdefault(ctx, deque()).append(value)
        return value

    def is_recalling(self) -> bool:
        """Whether a checkpoint runs a forward again that made something."""
        return in_backward() and any(ctx in self._made for ctx in _reentrant_checkpoints()[1])


def check_not_hidden() -> None:
    """Raise ValueError where what is decided in this forward could not be found again when it is recomputed."""
    if is_hidden() or in_backward():
        raise ValueError(
            "saved-tensor hooks between a checkpoint and this layer, e.g. save_on_cpu, hide which forward is "
            "recomputed, so it could not be replayed again; put them around the checkpoint"
        )


def is_hidden() -> bool:
    """Whether a non-reentrant checkpoint will run this forward again, and other saved-tensor hooks hide it."""
    return (
        torch.is_grad_enabled()
        and _checkpoint_hook() is None
        and any(
            frame.f_code.co_name == "checkpoint" and frame.f_globals.get("__name__") == checkpoint.__name__
            for frame in callers()
        )
    )


def _checkpoint_hook() -> Callable[..., Any] | None:
    """The pack hook of the innermost checkpoint around this call, if the innermost hooks are a checkpoint's."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    if not hooks:
        return None
    wrapped = getattr(hooks[0], "__wrapped__", hooks[0])
    return hooks[0] if wrapped.__module__ == checkpoint.__name__ else None


def _frame_of(hook: Callable[..., Any]) -> tuple[Any, bool]:
    """The checkpoint frame that ``hook`` works for, and whether it recomputes it."""
    unseen: list[Any] = [hook]
    while unseen:
        for cell in getattr(unseen.pop(), "__closure__", None) or ():
            held = cell.cell_contents
            if isinstance(held, checkpoint._CheckpointFrame):
                return held, False
            if isinstance(held, weakref.ref) and isinstance(held(), checkpoint._CheckpointFrame):
                return held(), True
            if callable(held):
                unseen.append(held)
    raise RuntimeError(
        f"torch {torch.__version__} checkpoints in a way that MoE does not know, so it cannot find the plan of the "
        "forward to recompute; leave MoE layers outside torch.utils.checkpoint, or use a torch version that "
        "moe_dispatch is tested with"
    )


def _reentrant_checkpoints() -> tuple[list[Any], list[Any]]:
    """The checkpoints whose forward this call is in, from the innermost on, up to the one that runs its forward
    again, if one does; and that one."""
    inside = list[Any]()
    for frame in callers():
        if frame.f_code is REENTRANT_BACKWARD:
            return inside, [frame.f_locals["ctx"]]
        if frame.f_code is REENTRANT_FORWARD:
            inside.append(frame.f_locals["ctx"])
    return inside, []
