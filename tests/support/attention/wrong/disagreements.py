"""Calls of the same sizes in which ranks differ; of ``wrong_calls.right_call``."""

from typing import Any

import torch

from moe_dispatch import Partition, TokenSharding
from tests.support.attention.wrong_calls import Change, documents, mask


def of_dtype(dtype: torch.dtype) -> Change:
    return lambda a: {name: a[name].to(dtype) for name in ("q_BlNH", "k_BlGH", "v_BlGH")}


def keys_of(seq: tuple[int, ...], ranks: tuple[int, ...] = (0, 1)) -> Change:
    """A sharding of keys, and keys and values of as many tokens as rank 0 or 1 has in (3, 4)."""
    return lambda a: {"kv_sharding": TokenSharding(batch=1, seq=Partition(seq)).select(ranks)}


def given(**options: Any) -> Change:
    return lambda a: options


# What differs between ranks: (on all of them, on rank 1), and words of either that tell. Of the same sizes: see
# shard_batch for the others.
DISAGREEMENTS: dict[str, tuple[Change, Change, tuple[str, str]]] = {
    "is_causal": (given(), given(is_causal=True), ("; ; one document", "; is_causal True; one document")),
    "window": (given(window=(2, 0)), given(window=(3, 0)), ("window (2, 0)", "window (3, 0)")),
    "scale": (given(), given(scale=0.5), ("; ; one document", "scale 0.5")),
    "dropout_p": (given(), given(dropout_p=0.5), ("; ; one document", "dropout 0.5")),
    "attn_mask": (given(), given(attn_mask=mask(7, 7)), ("; ; one document", "attn_mask (7, 7) of torch.bool")),
    "dtype of the mask": (
        given(attn_mask=mask(7, 7, dtype=torch.float32)),
        given(attn_mask=mask(7, 7, dtype=torch.bfloat16)),
        ("attn_mask (7, 7) of torch.float32", "attn_mask (7, 7) of torch.bfloat16"),
    ),
    "key_padding_mask": (
        given(),
        given(key_padding_mask=mask(1, 7)),
        ("; ; one document", "key_padding_mask (1, 7) of torch.bool"),
    ),
    "sinks_N": (given(), given(sinks_N=torch.zeros(4)), ("; ; one document", "sinks_n (4,) of torch.float32")),
    "cu_seqlens": (
        given(**documents([0, 3, 7])),
        given(**documents([0, 4, 7])),
        ("ends=(0, 3, 7)", "ends=(0, 4, 7)"),
    ),
    "cu_seqlens_padded": (
        given(**documents([0, 3, 6], [0, 3, 7])),
        given(**documents([0, 3, 6], [0, 4, 7])),
        ("starts=(0, 3, 7)", "starts=(0, 4, 7)"),
    ),
    "documents or none": (given(), given(**documents([0, 3, 7])), ("one document", "ends=(0, 3, 7)")),
    "order of the pieces": (
        given(sharding=TokenSharding(batch=1, seq=Partition((3, 4)))),
        given(sharding=TokenSharding.of_runs(batch=1, length=7, runs=[[(4, 7)], [(0, 4)]])),
        ("(3, 4) tokens, order BL, pieces in order", "(4, 3) tokens, order BL, pieces ((1,), (0,))"),
    ),
    "order of the pieces of keys": (
        given(kv_sharding=TokenSharding(batch=1, seq=Partition((3, 4)))),
        given(kv_sharding=TokenSharding(batch=1, seq=Partition((3, 2, 2)), held=((0,), (2, 1)))),
        ("keys (3, 4) tokens, order BL, pieces in order", "keys (3, 2, 2) tokens, order BL, pieces ((0,), (2, 1))"),
    ),
    "heads of the same size": (
        given(heads=Partition((2, 2))),
        given(heads=Partition((1, 3))),
        ("query heads (2, 2)", "query heads (1, 3)"),
    ),
    "key/value heads": (
        given(),
        lambda a: {name: a[name][:, :, :1] for name in ("k_BlGH", "v_BlGH")},
        ("2 key/value heads", "1 key/value heads"),
    ),
    "dtype": (of_dtype(torch.bfloat16), of_dtype(torch.float16), ("torch.bfloat16, widths", "torch.float16, widths")),
    "lengths of keys": (
        keys_of((3, 4)),
        keys_of((4, 3), (1, 0)),
        (
            "keys (3, 4) tokens, order BL, pieces in order, shards (0, 1)",
            "keys (4, 3) tokens, order BL, pieces in order, shards (1, 0)",
        ),
    ),
    "gradients": (
        given(),
        lambda a: {"k_BlGH": a["k_BlGH"].clone().requires_grad_()},
        ("gradients of q, k, v False, of options False", "gradients of q, k, v True, of options False"),
    ),
    "gradients of what is learned": (
        given(sinks_N=torch.zeros(4)),
        given(sinks_N=torch.zeros(4, requires_grad=True)),
        ("gradients of q, k, v False, of options False", "gradients of q, k, v False, of options True"),
    ),
    "gradients of what is learned only": (
        given(sinks_N=torch.zeros(4, requires_grad=True)),
        lambda a: {"q_BlNH": a["q_BlNH"].clone().requires_grad_(), "sinks_N": torch.zeros(4, requires_grad=True)},
        ("gradients of q, k, v False, of options True", "gradients of q, k, v True, of options True"),
    ),
}
