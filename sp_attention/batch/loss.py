"""The mean loss over the targets of all ranks, when shards hold different numbers of them.

    count  = sum over ranks of the number of real targets
    share  = (sum of this rank's losses) / count
    whole  = sum over ranks of share

So ``d whole = sum over ranks of d share``: backpropagate ``share`` on every rank and sum the parameter gradients, and
they are those of one process. A mean per rank, averaged over ranks, weighs a target by how few its rank holds.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch.internals import Statement, check_is_group, unseen_by_policies

from ..dtypes import dtype_of_sums, is_integer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeanLoss:
    """A mean over the targets of all ranks.

    Attributes:
        share: () this rank's share. Backpropagate it on every rank, also where it is 0, and *sum* the gradients of
            parameters; where a wrapper averages them instead (DDP, FSDP), multiply it by the number of ranks.
        whole: () the mean, the same on every rank, without a graph: to report. 0 if no rank has a target.
        num_targets: of all ranks.
    """

    share: Tensor
    whole: Tensor
    num_targets: int


def mean_loss(loss_Bl: Tensor, target_Bl: Tensor, *, group: dist.ProcessGroup, ignore_index: int = -100) -> MeanLoss:
    """The mean of losses per token over the real targets of all ranks. One all-reduce of three numbers, none in
    backward, and one host sync: for once per batch.

    Args:
        loss_Bl: (B, l), or (l, B), or any other shape: the loss of each of this rank's tokens
            (``reduction="none"``). What it holds where there is no target has no effect on the mean, NaN included,
            and its gradient there is 0. That 0 goes back into the graph that made it, and 0 times NaN or infinity
            there is NaN; :func:`mean_cross_entropy` leaves such places out of the graph.
        target_Bl: of that shape, ``ignore_index`` where there is no target.
        group: the ranks that hold different tokens: sequence parallel, or data and sequence parallel together.

    Returns:
        In float32, or float64 for float64. A rank without targets takes part, and keeps its graph.

    Raises:
        ValueError: the same text on every rank, naming the rank whose losses and targets do not fit.
    """
    problem = ""
    if not loss_Bl.is_floating_point() or loss_Bl.shape != target_Bl.shape:
        problem = (
            f"losses are {tuple(loss_Bl.shape)} of {loss_Bl.dtype} for targets {tuple(target_Bl.shape)}; they have "
            'to be floating, one per target: reduction="none"'
        )
    problem = problem or _problem_of_targets(target_Bl, loss_Bl.device)
    if problem:
        return _mean(loss_Bl, 0, problem, group)
    no_target_Bl = target_Bl == ignore_index
    loss_Bl = loss_Bl.to(dtype_of_sums(loss_Bl)).masked_fill(no_target_Bl, 0.0)
    return _mean(loss_Bl.sum(), (~no_target_Bl).sum(), "", group)


def mean_cross_entropy(
    logits_BlV: Tensor, target_Bl: Tensor, *, group: dist.ProcessGroup, ignore_index: int = -100
) -> MeanLoss:
    """:func:`mean_loss` of the cross-entropy of logits. Only the logits of real targets are read.

    Args:
        logits_BlV: (B, l, V), or (l, B, V), of this rank's tokens. The loss is taken in float32, or float64 for
            float64.
        target_Bl: (B, l), or (l, B): 0 to V - 1, or ``ignore_index``.

    Group, Returns, Raises: as there, also for a target outside the vocabulary.
    """
    problem = ""
    if not logits_BlV.is_floating_point() or logits_BlV.ndim < 2 or logits_BlV.shape[:-1] != target_Bl.shape:
        problem = (
            f"logits are {tuple(logits_BlV.shape)} of {logits_BlV.dtype} for targets {tuple(target_Bl.shape)}; they "
            "have to be floating, (B, l, V) for targets (B, l)"
        )
    problem = problem or _problem_of_targets(target_Bl, logits_BlV.device)
    if problem:
        return _mean(logits_BlV, 0, problem, group)
    has_target_t = (target_Bl != ignore_index).flatten()
    target_c = target_Bl.flatten()[has_target_t].to(torch.int64)
    outside_c = (target_c < 0) | (target_c >= logits_BlV.shape[-1])
    if bool(outside_c.any()):
        problem = (
            f"target {target_c[outside_c][0].item()} for logits of {logits_BlV.shape[-1]} tokens; it has to be 0 to "
            f"{logits_BlV.shape[-1] - 1}, or ignore_index = {ignore_index}"
        )
        return _mean(logits_BlV, 0, problem, group)
    logits_cV = logits_BlV.flatten(0, -2)[has_target_t].to(dtype_of_sums(logits_BlV))
    return _mean(F.cross_entropy(logits_cV, target_c, reduction="sum"), len(target_c), "", group)


@unseen_by_policies
def _mean(loss_sum: Tensor, count: int | Tensor, problem: str, group: dist.ProcessGroup) -> MeanLoss:
    """The mean of each rank's ``loss_sum`` over all ``count``, or the problems of all ranks."""
    check_is_group(group)
    # float64: float32 counts to 2 ** 24 tokens and no further.
    mine = torch.zeros(3, dtype=torch.float64, device=loss_sum.device)
    mine[2] = bool(problem)
    if not problem:
        mine[0], mine[1] = loss_sum.detach(), count
    if group.size() > 1:
        dist.all_reduce(mine, group=group)
    whole_sum, num_targets, problems = mine.tolist()
    if problems:
        Statement("nothing wrong here", problem).raise_on_every_rank(device=loss_sum.device, group=group)
    divisor = max(num_targets, 1.0)
    return MeanLoss(
        share=loss_sum / divisor, whole=loss_sum.new_tensor(whole_sum / divisor), num_targets=int(num_targets)
    )


def _problem_of_targets(target_Bl: Tensor, device: torch.device) -> str:
    if not is_integer(target_Bl):
        return f"targets are {target_Bl.dtype}; they have to be ints"
    if target_Bl.device != device:
        return f"targets are on {target_Bl.device}, but what they are for on {device}; move them there"
    return ""
