"""Attention over ranks in blocks, as an autograd Function. Source: FlashAttention-2 (arXiv:2307.08691)."""

from collections.abc import Sequence
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
    keys: Sequence[Tensor],
    weights: Sequence[Tensor],
    attn_mask: Tensor | None,
    sinks_N: Tensor | None,
) -> Tensor:
    """Attention of this rank's queries; the same call on every rank.

    Args:
        q_BlNH: this rank's tokens, all heads, batch first.
        keys: what travels of this rank's keys and values, as the source of ``spread`` takes it: (B, l, heads, width).
        weights: those that the source uses.
        attn_mask: (B, N, L, L_kv), each or 1, by place; the same on every rank.
        sinks_N: (N,).

    Returns:
        ``out_BlNH``: (B, l, N, Hv), of the dtype of the queries.

    Collectives: one for each turn that travels, and one back where queries travel. Backward makes them again, but for
    what was kept, and one for each turn of gradients.
    """
    return _AttendSpread.apply(spread, len(keys), q_BlNH, attn_mask, sinks_N, *keys, *weights)  # type: ignore[return-value]


class _AttendSpread(torch.autograd.Function):
    @staticmethod
    @unseen_by_policies
    def forward(
        ctx: Any,
        spread: Spread,
        num_keys: int,
        q_BlNH: Tensor,
        attn_mask: Tensor | None,
        sinks_N: Tensor | None,
        *rest: Tensor,
    ) -> Tensor:
        with without_autocast(q_BlNH):
            forward = Forward(spread, q_BlNH)
            out_BlNH = forward.run(rest[:num_keys], rest[num_keys:], attn_mask, sinks_N)
        ctx.spread, ctx.counts = spread, (num_keys, len(rest), len(forward.outs))
        ctx.save_for_backward(q_BlNH, attn_mask, sinks_N, *rest, *forward.outs, *forward.sums, *forward.kept)
        return out_BlNH

    @staticmethod
    @once_differentiable
    @unseen_by_policies
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_memory(*grads)
        num_keys, num_given, num_outs = ctx.counts
        q_BlNH, attn_mask, sinks_N, *saved = ctx.saved_tensors
        given, rest = saved[:num_given], saved[num_given:]
        learns = ctx.needs_input_grad
        with without_autocast(q_BlNH):
            source = ctx.spread.source(given[num_keys:], learns[5 + num_keys :])
            backward = Backward(ctx.spread, source, (q_BlNH, *given[:num_keys]), attn_mask, sinks_N, learns[3:5])
            backward.run(grads[0], rest[:num_outs], rest[num_outs : 2 * num_outs], rest[2 * num_outs :])
            of_weights = (
                None if x is None else x.to(weight.dtype)
                for x, weight in zip(source.weight_sums, given[num_keys:], strict=True)
            )
            dq, d_mask, d_sinks, *d_keys = backward.as_inputs()
            return None, None, dq, d_mask, d_sinks, *d_keys, *of_weights
