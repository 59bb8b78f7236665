"""The load-balancing loss of Transformers' routers over the tokens of all ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ...layer.balance import sequence_balance_loss
from ...wire.token_counts import gather_sharding


def global_aux_loss(
    router_logits: Sequence[Tensor], *, top_k: int, real_t: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """This rank's share of ``load_balancing_loss_func`` of Transformers, over the tokens of all ranks and without the
    model's factor (``router_aux_loss_coef``).

    Over all layers' tokens together it is ``E sum_i f_i P_i``: f_i is how many choices of expert i there are per
    token, P_i the mean of its probability. Only counts travel. The mean of the losses of ranks is something else.

    Args:
        router_logits: (t, E) of each layer, as ``out.router_logits``.
        top_k: K of the model, ``config.num_experts_per_tok``.
        real_t: (t,) bool: which tokens count. Not padding, nor the dummy of a rank without tokens.
        group: all ranks that hold different tokens.

    Returns:
        () share, in float32, or float64 for float64. Summed over the ranks it is the loss: backpropagate it on every
        rank, and *sum* the gradients.

    Raises:
        ValueError: no logits, or logits of other tokens than ``real_t`` has.
    """
    if not router_logits or any(x.ndim != 2 or len(x) != len(real_t) for x in router_logits):
        shapes = [tuple(x.shape) for x in router_logits]
        raise ValueError(
            f"router_logits are {shapes} for {len(real_t)} tokens; they have to be (t, E) of each layer: call the "
            "model with output_router_logits=True"
        )
    device = router_logits[0].device
    real_t = real_t.to(device)
    logits_nE = torch.cat([x.to(device)[real_t] for x in router_logits])
    score_nE = logits_nE.to(torch.promote_types(logits_nE.dtype, torch.float32)).softmax(-1)
    sharding = gather_sharding(len(score_nE), device=device, group=group)
    return top_k * sequence_balance_loss(score_nE.unsqueeze(0), top_k=top_k, sharding=sharding, group=group)
