"""Keep what a checkpointed forward decided, for its recomputation.

``torch.utils.checkpoint(use_reentrant=False)`` runs a region again in backward. Routing must not be decided again
there: a tie that falls the other way on one rank gives ranks different plans, which is a hang or wrong rows. PyTorch
has no public way to ask "which forward is being recomputed?"; the answer is the checkpoint's frame, which its
saved-tensor hooks hold. Where the innermost hooks are a checkpoint's and hold no frame, we refuse rather than decide
again. A reentrant checkpoint has no hooks, and other hooks around the layer (``save_on_cpu``) hide those of the
checkpoint: there tokens are routed again, on all ranks alike, and only a router that decides alike gives the same.
"""

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch.utils import checkpoint

T = TypeVar("T")


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
