"""Attention over pieces as an operator of torch: a compiled graph has one node for it, and does not look inside."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from moe_dispatch.internals import without_autocast

from ..dtypes import dtype_of_sums
from .dropout import Dropout
from .pieces import of_ints
from .sinks import add_sinks, gradient_of_sinks, with_sinks
from .tile import Options
from .walk import Attended, Gradients, add_attention, add_gradients


class Arguments(NamedTuple):
    """Those of the operator, which takes tensors and numbers only.

    Attributes:
        q_BLnH, k_BLgH, v_BLgH: (B, Lq, n, H), (B, Lk, g, H) and (B, Lk, g, Hv).
        attn_mask, key_padding_mask: as in :class:`Options`.
        sinks_n: (n,), or None where there are none.
        seed, dropout_p, dropout_starts: of a :class:`Dropout`, with its first head, query and key. No seed: nothing
            is dropped.
        pieces: as ints.
        scale, chunk: as in :class:`Options`.
    """

    q_BLnH: Tensor
    k_BLgH: Tensor
    v_BLgH: Tensor
    attn_mask: Tensor | None
    key_padding_mask: Tensor | None
    sinks_n: Tensor | None
    seed: Tensor | None
    dropout_p: float
    dropout_starts: list[int]
    pieces: list[int]
    scale: float
    chunk: int

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_BLnH, self.k_BLgH, self.v_BLgH

    @property
    def options(self) -> Options:
        dropout = None
        if self.seed is not None:
            head, query, key = self.dropout_starts
            dropout = Dropout(p=self.dropout_p, seed=self.seed, first_head=head, first_query=query, first_key=key)
        return Options(
            scale=self.scale,
            attn_mask=self.attn_mask,
            key_padding_mask=self.key_padding_mask,
            dropout=dropout,
            chunk=self.chunk,
        )

    def nothing(self) -> tuple[Tensor, Tensor]:
        """Output and log of the sum before any key, float32 or float64: (B, Lq, n, Hv) and (B, n, Lq)."""
        batch, length, heads, _ = self.q_BLnH.shape
        dtype = dtype_of_sums(self.q_BLnH)
        out_BLnH = self.q_BLnH.new_zeros(batch, length, heads, self.v_BLgH.shape[3], dtype=dtype)
        return out_BLnH, self.q_BLnH.new_full((batch, heads, length), -torch.inf, dtype=dtype)

    def gradients(self, mask_learns: bool) -> Gradients:
        """Before any piece."""
        wide = dtype_of_sums(self.q_BLnH)
        dq, dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in self.qkv)
        learned = [x for x in (self.attn_mask,) if mask_learns and x is not None]
        mask_BnLL = next((x.new_zeros(x.shape, dtype=wide) for x in learned), None)
        return Gradients(q_BLnH=dq, k_BLgH=dk, v_BLgH=dv, mask_BnLL=mask_BnLL)

    def as_inputs(self, grads: Gradients) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of q, k, v and the mask, each in its dtype; empty where there is no mask that learns."""
        sums = (grads.q_BLnH, grads.k_BLgH, grads.v_BLgH)
        dq, dk, dv = (x.to(like.dtype) for x, like in zip(sums, self.qkv, strict=True))
        if grads.mask_BnLL is None or self.attn_mask is None:
            return dq, dk, dv, self.q_BLnH.new_empty(0)
        return dq, dk, dv, grads.mask_BnLL.to(self.attn_mask.dtype)


def attend_pieces(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The output, in the dtype of the queries, and (B, n, Lq) the log of the sum over the keys: -inf where there was
    none."""
    asked = Arguments(*arguments)
    out_BLnH, lse_BnL = asked.nothing()
    with without_autocast(asked.q_BLnH):
        add_attention(out_BLnH, lse_BnL, asked.qkv, of_ints(asked.pieces), asked.options)
        add_sinks(out_BLnH, lse_BnL, asked.sinks_n)
    return out_BLnH.to(asked.q_BLnH.dtype), lse_BnL


def attend_pieces_backward(
    grad_BLnH: Tensor, out_BLnH: Tensor, lse_BnL: Tensor, mask_learns: bool, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, of the mask and of the sinks; empty where there is no such thing that learns.

    Args:
        grad_BLnH: of the output.
        out_BLnH, lse_BnL: what :func:`attend_pieces` gave.
        mask_learns: whether the mask has a gradient.
        arguments: as there.
    """
    asked = Arguments(*arguments)
    with without_autocast(asked.q_BLnH):
        whole_BnL, grads = with_sinks(lse_BnL, asked.sinks_n), asked.gradients(mask_learns)
        attended = Attended(
            grad_BLnH=grad_BLnH, out_BLnH=out_BLnH, lse_BnL=whole_BnL, closed_BnL=lse_BnL == -torch.inf
        )
        add_gradients(grads, attended, asked.qkv, of_ints(asked.pieces), asked.options)
        d_sinks_n = asked.q_BLnH.new_empty(0)
        if asked.sinks_n is not None:
            d_sinks_n = gradient_of_sinks(attended, asked.sinks_n)
    return *asked.as_inputs(grads), d_sinks_n


# ---- what torch knows of it ----------------------------------------------------------------------------


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    asked = Arguments(*arguments)
    out_BLnH, lse_BnL = asked.nothing()
    return out_BLnH.to(asked.q_BLnH.dtype), lse_BnL


def _fake_backward(
    grad_BLnH: Tensor, out_BLnH: Tensor, lse_BnL: Tensor, mask_learns: bool, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    asked = Arguments(*arguments)
    d_sinks_n = asked.q_BLnH.new_empty(0) if asked.sinks_n is None else torch.empty_like(asked.sinks_n)
    return *asked.as_inputs(asked.gradients(mask_learns)), d_sinks_n


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    asked = Arguments(*inputs)
    tensors = (*asked.qkv, asked.attn_mask, asked.key_padding_mask, asked.sinks_n, asked.seed)
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.numbers = asked[len(tensors) :]


def _backward(ctx: Any, grad_BLnH: Tensor, _lse_grad: Tensor) -> tuple[Tensor | None, ...]:
    out_BLnH, lse_BnL, *tensors = ctx.saved_tensors
    mask_learns, sinks_learn = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
    dq, dk, dv, d_mask, d_sinks = torch.ops.sp_attention.attend_pieces_backward(
        grad_BLnH, out_BLnH, lse_BnL, mask_learns, *tensors, *ctx.numbers
    )
    learned = (dq, dk, dv, d_mask if mask_learns else None, None, d_sinks if sinks_learn else None)
    return *learned, *(None,) * (len(ctx.needs_input_grad) - len(learned))


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "attention in blocks has no second derivative; for gradients of gradients pass an attend of your own, or "
        "flex_attend()"
    )


ARGUMENTS = (
    "Tensor q_BLnH, Tensor k_BLgH, Tensor v_BLgH, Tensor? attn_mask, Tensor? key_padding_mask, Tensor? sinks_n, "
    "Tensor? seed, float dropout_p, SymInt[] dropout_starts, SymInt[] pieces, float scale, SymInt chunk"
)
LIBRARY = Library("sp_attention", "DEF")  # what it registers lives as long as it does
LIBRARY.define(f"attend_pieces({ARGUMENTS}) -> (Tensor, Tensor)")
LIBRARY.define(
    "attend_pieces_backward(Tensor grad_BLnH, Tensor out_BLnH, Tensor lse_BnL, bool mask_learns, "
    f"{ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.impl("attend_pieces", attend_pieces, "CompositeExplicitAutograd")
LIBRARY.impl("attend_pieces_backward", attend_pieces_backward, "CompositeExplicitAutograd")
register_fake("sp_attention::attend_pieces", _fake, lib=LIBRARY)
register_fake("sp_attention::attend_pieces_backward", _fake_backward, lib=LIBRARY)
register_autograd("sp_attention::attend_pieces", _backward, setup_context=_keep, lib=LIBRARY)
register_autograd("sp_attention::attend_pieces_backward", _no_second_derivative, lib=LIBRARY)
