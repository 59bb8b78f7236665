"""Attention on the whole sequence on one rank, from its definition: for tests and for ``validate``.

It shares no code with the rest of the package. What may attend to what is decided one (query, key) pair at a time.
"""

from typing import Any

import torch
from torch import Tensor, nn


class ReferenceAttention(nn.Module):
    """``reference_attention`` as a module: what :class:`sp_attention.UlyssesAttention` is to one process.

    Args:
        is_causal, window, scale: as there.
    """

    def __init__(
        self, *, is_causal: bool = False, window: tuple[int, int] | None = None, scale: float | None = None
    ) -> None:
        super().__init__()
        self.is_causal, self.window, self.scale = is_causal, window, scale

    def forward(self, q_BLNH: Tensor, k_BLGH: Tensor, v_BLGH: Tensor, **options: Any) -> Tensor:
        """Masks, documents and sinks by the names of ``reference_attention``."""
        return reference_attention(
            q_BLNH, k_BLGH, v_BLGH, is_causal=self.is_causal, window=self.window, scale=self.scale, **options
        )

    def extra_repr(self) -> str:
        return f"is_causal={self.is_causal}, window={self.window}, scale={self.scale}"


def reference_attention(
    q_BLNH: Tensor,
    k_BLGH: Tensor,
    v_BLGH: Tensor,
    *,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_padded: Tensor | None = None,
    sinks_N: Tensor | None = None,
    keep_BNLL: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``softmax(scale q kᵀ + mask) v`` of whole sequences, in the dtype of the queries; autograd differentiates it.

    Args:
        q_BLNH: (B, L, N, H).
        k_BLGH, v_BLGH: (B, L_kv, G, H) and (B, L_kv, G, Hv); query head i uses key/value head i // (N / G).
        is_causal: query i sees key j if j <= i + L_kv - L: the last query sees every key.
        window: (left, right): query i sees the keys from i + L_kv - L - left to i + L_kv - L + right; -1 for any.
        scale: of the products; H ** -0.5 if left out.
        attn_mask: broadcasts to (B, N, L, L_kv): bool (True attends), or added to the products.
        key_padding_mask: (B, L_kv) bool, True attends.
        cu_seqlens: (documents + 1,) cumulated real lengths. A token sees its own document only, and what is in no
            document is padding. ``is_causal`` and ``window`` need L_kv = L then.
        cu_seqlens_padded: (documents + 1,) where each document starts; ``cu_seqlens`` if left out.
        sinks_N: (N,) a logit per query head that takes weight and has no value.
        keep_BNLL: broadcasts to (B, N, L, L_kv) bool: the weights that dropout keeps, multiplied by 1 / (1 -
            dropout_p).
        dropout_p: the fraction that dropout drops.

    Returns:
        (B, L, N, Hv). A query with nothing to attend to gives 0. It may hold anything, as may keys and values at
        padding and tokens in no document: NaN there reaches no result and no gradient. NaN of a query at
        ``key_padding_mask``, if L = L_kv, shows in its own output and nowhere else.
    """
    queries, keys = q_BLNH.shape[1], k_BLGH.shape[1]
    document_of_token = documents_of_tokens(queries, cu_seqlens, cu_seqlens_padded)
    seen_LL = pairs_seen(queries, keys, is_causal, window, document_of_token, q_BLNH.device)
    seen_BNLL = seen_LL[None, None]
    lost_BLN1 = torch.zeros((), dtype=torch.bool, device=q_BLNH.device)
    if key_padding_mask is not None:
        seen_BNLL = seen_BNLL & key_padding_mask[:, None, None, :]
        if queries == keys:
            lost_BLN1 = ~key_padding_mask[:, :, None, None] & ~torch.isfinite(q_BLNH).all(-1, keepdim=True)
        k_BLGH, v_BLGH = (torch.where(key_padding_mask[:, :, None, None], x, 0.0) for x in (k_BLGH, v_BLGH))
    if cu_seqlens is not None:
        real_L = torch.tensor([document >= 0 for document in document_of_token], device=q_BLNH.device)
        q_BLNH, k_BLGH, v_BLGH = (torch.where(real_L[:, None, None], x, 0.0) for x in (q_BLNH, k_BLGH, v_BLGH))
    added_BNLL = torch.zeros((), dtype=q_BLNH.dtype, device=q_BLNH.device)
    if attn_mask is not None:
        open_BNLL = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf
        seen_BNLL = seen_BNLL & open_BNLL
        if attn_mask.dtype != torch.bool:
            added_BNLL = torch.where(open_BNLL, attn_mask, 0.0).to(q_BLNH.dtype)
    sees_BLN1 = seen_BNLL.any(-1).transpose(1, 2).unsqueeze(-1)
    q_BLNH = torch.where(sees_BLN1 & ~lost_BLN1, q_BLNH, 0.0)
    weight_BNLL = weights(q_BLNH, k_BLGH, added_BNLL, seen_BNLL, scale, sinks_N)
    if keep_BNLL is not None:
        weight_BNLL = torch.where(keep_BNLL, weight_BNLL, 0.0) / (1 - dropout_p)
    out_BLNH = torch.einsum("bnqk,bknh->bqnh", weight_BNLL, per_query_head(v_BLGH, q_BLNH.shape[2]))
    return torch.where(lost_BLN1 & sees_BLN1, torch.nan, out_BLNH)


def pairs_seen(
    queries: int,
    keys: int,
    is_causal: bool,
    window: tuple[int, int] | None,
    document_of_token: list[int],
    device: torch.device,
) -> Tensor:
    """(L, L_kv) bool, what the places alone allow, pair by pair."""
    left, right = window if window is not None else (-1, -1)
    seen = [[False] * keys for _ in range(queries)]
    for query in range(queries):
        place = query + keys - queries
        for key in range(keys):
            same = not document_of_token or document_of_token[query] == document_of_token[key] >= 0
            past = key <= place or not is_causal
            near = (left < 0 or key >= place - left) and (right < 0 or key <= place + right)
            seen[query][key] = same and past and near
    return torch.tensor(seen, dtype=torch.bool, device=device).view(queries, keys)


def documents_of_tokens(length: int, cu_seqlens: Tensor | None, cu_seqlens_padded: Tensor | None) -> list[int]:
    """The document of each token, -1 for padding; empty where there are no documents."""
    if cu_seqlens is None:
        return []
    ends = cu_seqlens.tolist()
    starts = ends if cu_seqlens_padded is None else cu_seqlens_padded.tolist()
    document_of_token = [-1] * length
    for document in range(len(ends) - 1):
        for token in range(ends[document + 1] - ends[document]):
            document_of_token[starts[document] + token] = document
    return document_of_token


def weights(
    q_BLNH: Tensor,
    k_BLGH: Tensor,
    added_BNLL: Tensor,
    seen_BNLL: Tensor,
    scale: float | None,
    sinks_N: Tensor | None,
) -> Tensor:
    """(B, N, L, L_kv) the softmax, 0 where a pair is not seen and for a query that sees nothing."""
    num_heads, width = q_BLNH.shape[2:]
    k_BLNH = per_query_head(k_BLGH, num_heads)
    product_BNLL = torch.einsum("bqnh,bknh->bnqk", q_BLNH, k_BLNH) * (width**-0.5 if scale is None else scale)
    product_BNLL = product_BNLL + added_BNLL
    seen_BNLL = seen_BNLL.expand_as(product_BNLL)
    sinks_N = q_BLNH.new_full((num_heads,), -torch.inf) if sinks_N is None else sinks_N.to(q_BLNH.dtype)
    sink_BNL1 = sinks_N[:, None, None].expand(*product_BNLL.shape[:3], 1)
    power_BNLL = torch.where(seen_BNLL, product_BNLL, -torch.inf)
    largest_BNL1 = torch.cat([power_BNLL, sink_BNL1], dim=-1).detach().amax(-1, keepdim=True)
    largest_BNL1 = torch.where(largest_BNL1 == -torch.inf, 0.0, largest_BNL1)
    power_BNLL = torch.exp(power_BNLL - largest_BNL1)
    total_BNL1 = power_BNLL.sum(-1, keepdim=True) + torch.exp(sink_BNL1 - largest_BNL1)
    return power_BNLL / torch.where(total_BNL1 == 0.0, 1.0, total_BNL1)


def per_query_head(x_BLGH: Tensor, num_heads: int) -> Tensor:
    """(B, L, N, H): the key/value head of each query head."""
    groups = x_BLGH.shape[2]
    return torch.stack([x_BLGH[:, :, head // (num_heads // groups)] for head in range(num_heads)], dim=2)
