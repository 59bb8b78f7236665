"""Attention over ranks in blocks, as an autograd Function. Source: FlashAttention-2 (arXiv:2307.08691)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dispatch.internals import check_memory, unseen_by_policies, without_autocast

from .backward import Backward
from .forward import Forward
from .spread import Spread


def attend_spread(
    spread: Spread,
    q_BlNH: Tensor,
    k_BlGH: Tensor,
    v_BlGH: Tensor,
    attn_mask: Tensor | None,
    sinks_N: Tensor | None,
) -> Tensor:
    """Attention of this rank's queries; the same call on every rank.

    Args:
        q_BlNH, k_BlGH, v_BlGH: this rank's tokens, all heads, batch first.
        attn_mask: (B, N, L, L_kv), each or 1, by place; the same on every rank.
        sinks_N: (N,).

    Returns:
        ``out_BlNH``: (B, l, N, Hv), of the dtype of the queries.

    Collectives: one for each turn that travels, and one back where queries travel. Backward makes them again, but for
    what was kept, and one for each turn of gradients.
    """
    return _AttendSpread.apply(spread, q_BlNH, k_BlGH, v_BlGH, attn_mask, sinks_N)  # type: ignore[return-value]


class _AttendSpread(torch.autograd.Function):
    @staticmethod
    @unseen_by_policies
    def forward(
        ctx: Any,
        spread: Spread,
        q_BlNH: Tensor,
        k_BlGH: Tensor,
        v_BlGH: Tensor,
        attn_mask: Tensor | None,
        sinks_N: Tensor | None,
    ) -> Tensor:
        with without_autocast(q_BlNH):
            forward = Forward(spread, q_BlNH, v_BlGH)
            out_BlNH = forward.run(k_BlGH, v_BlGH, attn_mask, sinks_N)
        ctx.spread, ctx.counts = spread, (len(forward.outs), len(forward.kept))
        ctx.save_for_backward(q_BlNH, k_BlGH, v_BlGH, attn_mask, sinks_N, *forward.outs, *forward.sums, *forward.kept)
        return out_BlNH

    @staticmethod
    @once_differentiable
    @unseen_by_policies
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_memory(*grads)
        q_BlNH, k_BlGH, v_BlGH, attn_mask, sinks_N, *rest = ctx.saved_tensors
        num_outs, _ = ctx.counts
        with without_autocast(q_BlNH):
            backward = Backward(ctx.spread, (q_BlNH, k_BlGH, v_BlGH), attn_mask, sinks_N, ctx.needs_input_grad[4:])
            backward.run(grads[0], rest[:num_outs], rest[num_outs : 2 * num_outs], rest[2 * num_outs :])
        return None, *backward.as_inputs()
