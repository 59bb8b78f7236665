"""The loss of a causal model over the tokens of all ranks."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from moe_dispatch.integrations.transformers import global_aux_loss

from ...batch.loss import MeanLoss, mean_cross_entropy
from ...parallel.on_mesh import everyone
from .step import IGNORED, Step


def causal_lm_loss(model: Any, out: Any, step: Step, *, num_targets: int | Tensor | None = None) -> MeanLoss:
    """What Transformers' model gives as ``loss`` on one process with the whole batch: the mean of the cross-entropy
    over the targets of all ranks, plus ``router_aux_loss_coef`` times the load-balancing loss over all tokens where
    the model has one and is asked for it (``output_router_logits``).

    Args:
        model: for its factor and K.
        out: what ``model(**step.inputs)`` returned.
        num_targets: of all microbatches of a step; see :func:`sp_attention.mean_loss`.

    Returns:
        ``share`` to backpropagate on every rank, whose gradients are *summed*; ``whole`` to report. The
        load-balancing loss is that of this batch, whatever ``num_targets`` is: divide it by microbatches as you do
        in Transformers.

    Raises:
        GroupError: as :func:`sp_attention.mean_cross_entropy`.
    """
    group = everyone()
    mean = mean_cross_entropy(
        step.own(out.logits), step.target_Bl, group=group, ignore_index=IGNORED, num_targets=num_targets
    )
    # Models without such a loss (DeepSeek-V3) have router logits, too. Its value is that of this rank's tokens.
    if getattr(out, "aux_loss", None) is None:
        return mean
    aux = model.router_aux_loss_coef * global_aux_loss(
        out.router_logits, top_k=model.num_experts_per_tok, real_t=step.feed(step.real_Bl).flatten(), group=group
    )
    whole_aux = aux.detach().clone()
    dist.all_reduce(whole_aux, group=group)
    return MeanLoss(share=mean.share + aux, whole=mean.whole + whole_aux, num_targets=mean.num_targets)
