"""The functions that Transformers calls in place of its own attention and masks."""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...call.over_ranks import attention_over_ranks
from ...call.ulysses import ulysses_attention
from ...work.scheme import ULYSSES
from .interface import AttentionInterface, AttentionMaskInterface
from .step import Step

# The registries are the process's. What is in them knows no model, mesh or batch, so two names serve all of them:
# for models that keep packed documents apart, and for those that do not look for any.
NAME, NAME_APART = "sp_attention", "sp_attention_packed"
# Keywords that say nothing about the result of attention.
HARMLESS = (
    "position_ids",
    "use_cache",
    "output_router_logits",
    "output_hidden_states",
    "return_dict",
    "cache_position",
)
NO_STEP = (
    "the attention of this model is cut over ranks, and it was called without a step: call model(**step.inputs) with "
    "step = shard_batch(batch, mesh)"
)


def attend_over_ranks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    keeps_documents_apart: bool,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    step: Step | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of this rank's tokens over the whole sequence.

    Args:
        query: (b, N, l, H), all heads, after the rotary embedding.
        key, value: (b, G, l, H) and (b, G, l, Hv).
        attention_mask: None: :func:`no_mask` makes no other, and padding and documents are in the step.
        scaling: of the products; given by the model, as it may have more in it than H ** -0.5.
        sliding_window: how many keys a query sees, itself included.
        s_aux: (N,) sinks.

    Returns:
        (b, l, N, Hv), and no weights.
    """
    if not isinstance(step, Step):
        raise ValueError(NO_STEP)
    if attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__} got a mask of its own; pass a (B, L) attention_mask to shard_batch, no other"
        )
    unknown = sorted(name for name, x in others.items() if x is not None and x is not False and name not in HARMLESS)
    if unknown:
        raise ValueError(
            f"{type(module).__name__} passes {', '.join(unknown)} to attention, which cannot be honoured over ranks "
            "here; leave that out, or use another model"
        )
    q_BlNH, k_BlGH, v_BlGH = (step.own(x.transpose(1, 2)) for x in (query, key, value))
    # ulysses_attention has a collective less, and no break in a compiled graph.
    attention = ulysses_attention if step.scheme == ULYSSES else partial(attention_over_ranks, scheme=step.scheme)
    out_BlNH = attention(
        q_BlNH,
        k_BlGH,
        v_BlGH,
        group=step.mesh.dense.get_group("sp"),
        is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        window=None if sliding_window is None else (sliding_window - 1, 0),
        scale=scaling,
        dropout_p=dropout,
        sinks_N=s_aux,
        **(step.packed_options if keeps_documents_apart else step.padding_options),
    )
    missing = [fed - own for fed, own in zip(step.fed_shape, out_BlNH.shape[:2], strict=True)]
    return F.pad(out_BlNH, (0, 0, 0, 0, 0, missing[1], 0, missing[0])), None


def no_mask(*args: Any, attention_mask: Tensor | None = None, **others: Any) -> None:
    """In place of Transformers' masks, which would be of this rank's tokens only. Registered so that a mask that was
    passed beside the step is refused: without a registered function it would be dropped in silence."""
    if attention_mask is not None:
        raise ValueError("attention_mask was passed beside the step; pass it to shard_batch, whole, and not here")


def register() -> None:
    """Put the functions into Transformers' registries."""
    for name in (NAME, NAME_APART):
        AttentionInterface.register(name, partial(attend_over_ranks, keeps_documents_apart=name == NAME_APART))
        AttentionMaskInterface.register(name, no_mask)
