"""What can be wrong with the ids and weights that a rank plans with."""

from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ...layout.partition import Partition
from ...layout.sharding import TokenSharding
from ...wire.agreement import BAD, Statement
from ...wire.devices import device_for, problem_of_devices
from ...wire.local_tensors import problem_of_dtensors
from ..terms import Terms
from .format import ID_DTYPES, NO_EXPERT


class Refusing(Protocol):
    """A form of plan, that a rank without ids takes its part in."""

    def refuse(
        self, problem: str, terms: Terms, group: dist.ProcessGroup, *, num_choices: int, device: torch.device
    ) -> NoReturn: ...


def ids_or_refusal(
    form: Refusing, expert_BlK: Tensor, weight_BlK: Tensor | None, terms: Terms, group: dist.ProcessGroup
) -> Tensor:
    """The ids as int64. Where this rank's arguments are wrong, its peers are told, and every rank raises.

    Raises:
        ValueError: terms that do not describe the ranks of ``group``; on every rank, before any collective.
    """
    terms.check(group)
    if problem := _problem_of_arguments(expert_BlK, weight_BlK, terms.sharding, group):
        num_choices, device = expected_message(expert_BlK, weight_BlK, group)
        form.refuse(problem, terms, group, num_choices=num_choices, device=device)
    return expert_BlK.to(torch.int64)


def raise_by_words(
    words: Sequence[int],
    facts: str,
    expert_BlK: Tensor,
    weight_BlK: Tensor | None,
    terms: Terms,
    group: dist.ProcessGroup,
) -> NoReturn:
    """Raise the same error on every rank, where one has not sent the word of ``facts``.

    Args:
        words: those of all ranks, in their order.
    """
    problem = _problem_of_values(expert_BlK, weight_BlK, terms.experts) if words[group.rank()] == BAD else ""
    Statement(facts, problem).raise_on_every_rank(device=expert_BlK.device, group=group)


def _problem_of_arguments(
    expert_BlK: Tensor, weight_BlK: Tensor | None, sharding: TokenSharding, group: dist.ProcessGroup
) -> str:
    """What is wrong with this rank's tensors, without a look at their values; empty where nothing is."""
    return (
        problem_of_dtensors(expert_BlK=expert_BlK, weight_BlK=weight_BlK)
        or _problem_of_ids(expert_BlK, sharding, group.rank())
        or _problem_of_weights(expert_BlK, weight_BlK)
        or problem_of_devices(group, expert_BlK=expert_BlK, weight_BlK=weight_BlK)
    )


def expected_message(
    expert_BlK: Tensor, weight_BlK: Tensor | None, group: dist.ProcessGroup
) -> tuple[int, torch.device]:
    """K, and the device, that the peers of a rank with wrong arguments expect of it."""
    return expected_choices(expert_BlK, weight_BlK), device_for((weight_BlK, expert_BlK), group)


def expected_choices(expert_BlK: Tensor, weight_BlK: Tensor | None) -> int:
    """K, as far as the ids or weights still tell it: a message is as long as K says."""
    return next(filter(None, map(_last_size, (weight_BlK, expert_BlK))), 1)


def _last_size(x: Any) -> int:
    """Of the last dimension of a tensor, an array or nested lists; 0 where there is none."""
    while isinstance(x, list | tuple) and x and isinstance(x[0], list | tuple):
        x = x[0]
    shape: Any = (len(x),) if isinstance(x, list | tuple) else getattr(x, "shape", ())
    return shape[-1] if len(shape) else 0


def checked_ids(expert_BlK: Tensor, weight_BlK: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
    """What a rank plans with, made on the device, so that a bad value costs no host sync of its own.

    Returns:
        (t, K) a copy of the ids, clamped to the experts there are, and (): whether an id or a weight is bad.
    """
    expert_tK = expert_BlK.flatten(0, 1)
    id_tK = expert_tK.clamp(NO_EXPERT, num_experts - 1)
    bad_tK = expert_tK != id_tK
    if weight_BlK is not None:
        bad_tK = bad_tK.logical_or_(weight_BlK.isnan().flatten(0, 1))
    return id_tK, bad_tK.any()


def _problem_of_values(expert_BlK: Tensor, weight_BlK: Tensor | None, experts: Partition) -> str:
    """The first value at fault. It reads the device, so it is for a rank that knows that there is one."""
    expert_tK = expert_BlK.flatten(0, 1)
    outside_tK = (expert_tK < -1) | (expert_tK >= experts.total)
    for token, choice in outside_tK.nonzero()[:1].tolist():
        return (
            f"expert id {int(expert_tK[token, choice])} at local token {token}, choice {choice}; ids are 0 to "
            f"{experts.total - 1}, or -1 for no expert"
        )
    nan_tK = torch.zeros_like(outside_tK) if weight_BlK is None else weight_BlK.flatten(0, 1).isnan()
    token, choice = nan_tK.nonzero()[0].tolist()
    return f"the weight at local token {token}, choice {choice} is NaN; look for NaN or Inf in the router's input"


def _problem_of_ids(expert_BlK: Tensor, sharding: TokenSharding, rank: int) -> str:
    if not isinstance(expert_BlK, Tensor) or expert_BlK.dtype not in ID_DTYPES:
        got = expert_BlK.dtype if isinstance(expert_BlK, Tensor) else type(expert_BlK)
        return (
            f"expert ids are {got}; they have to be a torch.int64 or torch.int32 tensor, e.g. scores.topk(K).indices"
        )
    if expert_BlK.ndim != 3 or tuple(expert_BlK.shape[:2]) != sharding.local_shape(rank) or not expert_BlK.shape[2]:
        return (
            f"expert ids of shape {tuple(expert_BlK.shape)}; its shard in order {sharding.order!r} is "
            f"{sharding.local_shape(rank)}, so they have to be {(*sharding.local_shape(rank), 'K')} with K >= 1"
        )
    return ""


def _problem_of_weights(expert_BlK: Tensor, weight_BlK: Tensor | None) -> str:
    if weight_BlK is None:
        return ""
    if not isinstance(weight_BlK, Tensor):
        return f"weights are {type(weight_BlK)}; they have to be a floating-point tensor, one for each choice"
    if weight_BlK.shape == expert_BlK.shape and weight_BlK.is_floating_point():
        return ""
    return (
        f"weights of shape {tuple(weight_BlK.shape)} and dtype {weight_BlK.dtype} for ids of shape "
        f"{tuple(expert_BlK.shape)}; each choice needs one floating-point weight"
    )
