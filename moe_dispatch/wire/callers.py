"""Around whom an exchange between ranks cannot run: asked on every rank alike, before anything is sent."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def check_callers(num_ranks: int) -> None:
    """Raise where an exchange of ``num_ranks`` ranks cannot run.

    Raises:
        RuntimeError: inside of torch.func.
        ValueError: inside of ``DistributedDataParallel.join()``, which lets a rank leave early while its peers wait
            for it; but for a group of one rank, and where the join ends all ranks together.
    """
    if torch.compiler.is_compiling():
        return
    if functorch.maybe_current_level() is not None:
        _refuse_transform()
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or num_ranks == 1:
        return
    if ddp._join_config.enable and not ddp._join_config.throw_on_early_termination:
        raise ValueError(
            "DistributedDataParallel.join() goes on without the ranks that have no batch left, but an exchange needs "
            "every rank of its group; call the model on all ranks, with a sharding that gives those 0 tokens, or use "
            "join(throw_on_early_termination=True)"
        )


def check_memory(*tensors: Tensor) -> None:
    """Raise unless the tensors have memory of their own to send. Only they tell of a backward that
    ``torch.autograd.grad(is_grads_batched=True)`` maps.

    Raises:
        RuntimeError: they are mapped.
    """
    if not torch.compiler.is_compiling() and any(map(functorch.is_legacy_batchedtensor, tensors)):
        _refuse_transform()


def _refuse_transform() -> NoReturn:
    raise RuntimeError(
        "an exchange between ranks inside of a torch.func transform (grad, vmap, jvp), or of a batched backward; "
        "use loss.backward() or torch.autograd.grad, one at a time"
    )
