"""The mean loss over the targets of all ranks, when shards hold different numbers of them.

    count  = sum over ranks of the number of real targets
    share  = (sum of this rank's losses) / count
    whole  = sum over ranks of share

So ``d whole = sum over ranks of d share``: backpropagate ``share`` on every rank and sum the parameter gradients, and
they are those of one process. A mean per rank, averaged over ranks, weighs a target by how few its rank holds.

A step in microbatches is the same sum with one more index. Its count is that of all microbatches, so it has to be
known before the first: :func:`count_targets`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch import GroupError
from moe_dispatch.internals import (
    Statement,
    check_is_group,
    device_for,
    digest,
    problem_of_devices,
    problem_of_dtensors,
    unseen_by_policies,
)

from ..dtypes import dtype_of_sums, is_integer

WORDS = 2**20  # squares of words add up exactly in float64 over 2**13 ranks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeanLoss:
    """A mean over the targets of all ranks.

    Attributes:
        share: () this rank's share. Backpropagate it on every rank, also where it is 0, and *sum* the gradients of
            parameters; where a wrapper averages them instead (DDP, FSDP), multiply it by the number of ranks.
        whole: () the sum of the shares, the same on every rank, without a graph: to report. The mean, or with a
            ``num_targets`` of several microbatches this one's part of it: add them up. 0 if no rank has a target.
        num_targets: what sums were divided by: as it was given, or else the targets of all ranks in this call.
    """

    share: Tensor
    whole: Tensor
    num_targets: int


def count_targets(target_Bl: Tensor | Sequence[Tensor], *, group: dist.ProcessGroup, ignore_index: int = -100) -> int:
    """The number of real targets of all ranks, to divide by in each microbatch of a step: the ``num_targets`` of
    :func:`mean_loss`. One all-reduce of two numbers and one host sync.

    Args:
        target_Bl: this rank's targets of any shape, or those of its microbatches, as many as it has.
        group: the ranks that hold different tokens, as for :func:`mean_loss`.
        ignore_index: what there is where there is no target.

    Raises:
        ValueError: the same text on every rank, naming the rank whose targets are no ints.
    """
    check_is_group(group)
    targets = [target_Bl] if isinstance(target_Bl, Tensor) else list(target_Bl)
    device = device_for(targets, group)
    problem = next((text for x in targets if (text := _problem_of_targets(x, device))), "")
    count = torch.zeros(2, dtype=torch.float64, device=device)
    count[1].fill_(bool(problem))
    if not problem:
        for x in targets:
            count[0] += (x != ignore_index).sum()
    if group.size() > 1:
        dist.all_reduce(count, group=group)
    num_targets, problems = count.tolist()
    if problems:
        Statement("nothing wrong here", problem).raise_on_every_rank(device=device, group=group)
    return int(num_targets)


def mean_loss(
    loss_Bl: Tensor,
    target_Bl: Tensor,
    *,
    group: dist.ProcessGroup,
    ignore_index: int = -100,
    num_targets: int | Tensor | None = None,
) -> MeanLoss:
    """The mean of losses per token over the real targets of all ranks. One all-reduce of five numbers, none in
    backward, and one host sync: for once per batch.

    Args:
        loss_Bl: (B, l), or (l, B), or any other shape: the loss of each of this rank's tokens
            (``reduction="none"``). What it holds where there is no target has no effect on the mean, NaN included,
            and its gradient there is 0. That 0 goes back into the graph that made it, and 0 times NaN or infinity
            there is NaN; :func:`mean_cross_entropy` leaves such places out of the graph.
        target_Bl: of that shape, ``ignore_index`` where there is no target.
        group: the ranks that hold different tokens: sequence parallel, or data and sequence parallel together.
        num_targets: what to divide by, an int or a () tensor of one, the same on every rank: the targets of all ranks
            in all microbatches of the step, as :func:`count_targets` counts them. Gradients of all microbatches then
            add up to those of one batch, however many targets each has. If left out, the targets of this call.

    Returns:
        In float32, or float64 for float64. A rank without targets takes part, and keeps its graph.

    Raises:
        ValueError: the same text on every rank. It names the rank whose losses and targets do not fit, or the ranks
            that pass another ``num_targets``; or there are more targets in this call than that.
    """
    check_is_group(group)
    problem = _problem_of_tensors(group, loss_Bl=loss_Bl, target_Bl=target_Bl)
    if not problem and (not loss_Bl.is_floating_point() or loss_Bl.shape != target_Bl.shape):
        problem = (
            f"losses are {tuple(loss_Bl.shape)} of {loss_Bl.dtype} for targets {tuple(target_Bl.shape)}; they have "
            'to be floating, one per target: reduction="none"'
        )
    problem = problem or _problem_of_targets(target_Bl, loss_Bl.device)
    if problem:
        return _mean(loss_Bl, 0, problem, group, num_targets)
    no_target_Bl = target_Bl == ignore_index
    loss_Bl = loss_Bl.to(dtype_of_sums(loss_Bl)).masked_fill(no_target_Bl, 0.0)
    return _mean(loss_Bl.sum(), (~no_target_Bl).sum(), "", group, num_targets)


def mean_cross_entropy(
    logits_BlV: Tensor,
    target_Bl: Tensor,
    *,
    group: dist.ProcessGroup,
    ignore_index: int = -100,
    num_targets: int | Tensor | None = None,
) -> MeanLoss:
    """:func:`mean_loss` of the cross-entropy of logits. Only the logits of real targets are read: their number is one
    host sync more.

    Args:
        logits_BlV: (B, l, V), or (l, B, V), of this rank's tokens. The loss is taken in float32, or float64 for
            float64.
        target_Bl: (B, l), or (l, B): 0 to V - 1, or ``ignore_index``.

    Group, num_targets, Returns, Raises: as there, also for a target outside the vocabulary.
    """
    check_is_group(group)
    problem = _problem_of_tensors(group, logits_BlV=logits_BlV, target_Bl=target_Bl)
    if not problem and not (
        logits_BlV.is_floating_point() and logits_BlV.ndim >= 2 and logits_BlV.shape[:-1] == target_Bl.shape
    ):
        problem = (
            f"logits are {tuple(logits_BlV.shape)} of {logits_BlV.dtype} for targets {tuple(target_Bl.shape)}; they "
            "have to be floating, (B, l, V) for targets (B, l)"
        )
    problem = problem or _problem_of_targets(target_Bl, logits_BlV.device)
    if problem:
        return _mean(logits_BlV, 0, problem, group, num_targets)
    target_t, vocabulary = target_Bl.flatten(), logits_BlV.shape[-1]
    has_target_t = target_t != ignore_index
    outside_t = has_target_t & ((target_t < 0) | (target_t >= vocabulary))
    count, num_outside = torch.stack([has_target_t.sum(), outside_t.sum()]).tolist()
    if num_outside:
        problem = (
            f"target {target_t[outside_t][0].item()} for logits of {vocabulary} tokens; it has to be 0 to "
            f"{vocabulary - 1}, or ignore_index = {ignore_index}"
        )
        return _mean(logits_BlV, 0, problem, group, num_targets)
    # Of known size, so that neither this nor its gradient waits for the device.
    t_of_target_c = torch.nonzero_static(has_target_t, size=count)[:, 0]
    logits_cV = logits_BlV.flatten(0, -2).index_select(0, t_of_target_c).to(dtype_of_sums(logits_BlV))
    target_c = target_t.index_select(0, t_of_target_c).to(torch.int64)
    return _mean(F.cross_entropy(logits_cV, target_c, reduction="sum"), count, "", group, num_targets)


@unseen_by_policies
def _mean(
    loss_sum: Tensor, count: int | Tensor, problem: str, group: dist.ProcessGroup, num_targets: int | Tensor | None
) -> MeanLoss:
    """Each rank's ``loss_sum`` over the ``count`` of all ranks, or over ``num_targets`` where that is given; or the
    problems of all ranks."""
    problem = problem or _problem_of_denominator(num_targets)
    given = None if problem or num_targets is None else int(num_targets)
    facts = f"num_targets {'left out' if given is None else given}"
    word = digest(facts) % WORDS
    device = device_for([loss_sum], group)
    # float64: float32 counts to 2 ** 24 tokens and no further. Filled on the device: a tensor of Python numbers would
    # be a copy that waits.
    mine = torch.zeros(5, dtype=torch.float64, device=device)
    if not problem:
        mine[0].copy_(loss_sum.detach())
        mine[1].fill_(count)
    for at, value in enumerate((bool(problem), word, word * word), start=2):
        mine[at].fill_(value)
    if group.size() > 1:
        dist.all_reduce(mine, group=group)
    whole_sum, counted, problems, words, squares = mine.tolist()
    # Words are all the same exactly where they have no variance.
    if problems or group.size() * int(squares) != int(words) ** 2:
        Statement(facts, problem).raise_on_every_rank(device=device, group=group)
    divisor = int(counted) if given is None else given
    if counted > divisor:
        raise GroupError(
            f"num_targets is {divisor}, but this call has {int(counted)} targets on all ranks; pass the number of "
            "all microbatches and all ranks, as count_targets gives it"
        )
    return MeanLoss(
        share=loss_sum / max(divisor, 1),
        whole=loss_sum.new_full((), whole_sum / max(divisor, 1)),
        num_targets=divisor,
    )


def _problem_of_denominator(num_targets: object) -> str:
    if num_targets is None:
        return ""
    if isinstance(num_targets, Tensor):
        fits = num_targets.ndim == 0 and is_integer(num_targets) and int(num_targets) >= 0
        got = f"{tuple(num_targets.shape)} of {num_targets.dtype}" if num_targets.ndim else f"{num_targets}"
    else:
        fits = isinstance(num_targets, int) and not isinstance(num_targets, bool) and num_targets >= 0
        got = f"{num_targets!r}"
    return "" if fits else f"num_targets is {got}; it has to be an int of at least 0, or a tensor () of one"


def _problem_of_tensors(group: dist.ProcessGroup, **tensors: object) -> str:
    """What is wrong with arguments that are no tensors of this rank's on a device of the group; empty where nothing
    is. Of targets on another device, their own check tells."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            return f"{name} is {type(x).__name__}; it has to be a tensor"
    first, x = next(iter(tensors.items()))
    return problem_of_dtensors(**tensors) or problem_of_devices(group, **{first: x})


def _problem_of_targets(target_Bl: object, device: torch.device) -> str:
    if not isinstance(target_Bl, Tensor):
        return f"targets are {type(target_Bl).__name__}; they have to be a tensor of ints"
    if problem := problem_of_dtensors(target_Bl=target_Bl):
        return problem
    if not is_integer(target_Bl):
        return f"targets are {target_Bl.dtype}; they have to be ints"
    if target_Bl.device != device:
        return f"targets are on {target_Bl.device}, but what they are for on {device}; move them there"
    return ""
