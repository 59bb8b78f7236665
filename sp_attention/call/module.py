"""Attention over ranks as modules."""

from typing import Any, Self

import torch.distributed as dist
from torch import Tensor, nn

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.internals import copy_in_group, state_without_group

from ..work.scheme import ULYSSES, Scheme
from .outcome import Attend
from .over_ranks import attention_over_ranks
from .ulysses import ulysses_attention


class AttentionOverRanks(nn.Module):
    """:func:`attention_over_ranks` with the choices that do not change from call to call. It has no parameters and no
    state but those of an ``attend`` that is a module. A deep copy is in the same process group. A file of the whole
    module has no group: set ``group`` after loading.

    Args:
        group, scheme, heads, attend, is_causal, window, scale, dropout_p: as there. Dropout is off in eval mode.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup,
        scheme: Scheme = ULYSSES,
        heads: Partition | None = None,
        attend: Attend | None = None,
        is_causal: bool = False,
        window: tuple[int, int] | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        self.group, self.scheme, self.heads, self.attend = group, scheme, heads, attend
        self.is_causal, self.window, self.scale, self.dropout_p = is_causal, window, scale, dropout_p

    def forward(
        self,
        q_BlNH: Tensor,
        k_BlGH: Tensor,
        v_BlGH: Tensor,
        *,
        sharding: TokenSharding,
        kv_sharding: TokenSharding | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_padded: Tensor | None = None,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        """The call. Arguments as of :func:`attention_over_ranks`.

        Args:
            q_BlNH: (B, l, N, H), or (l, B, N, H) for order "LB".
            k_BlGH, v_BlGH: (B, l, G, H) and (B, l, G, Hv), or sequence first.

        Returns:
            ``out_BlNH``: (B, l, N, Hv), or (l, B, N, Hv).

        Raises:
            GroupError, ValueError: as there.
        """
        return self._attention(
            q_BlNH,
            k_BlGH,
            v_BlGH,
            sharding=sharding,
            group=self.group,
            kv_sharding=kv_sharding,
            heads=self.heads,
            attend=self.attend,
            is_causal=self.is_causal,
            window=self.window,
            scale=self.scale,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            cu_seqlens_padded=cu_seqlens_padded,
            dropout_p=self.dropout_p if self.training else 0.0,
            sinks_N=sinks_N,
        )

    def _attention(self, *tensors: Tensor, **options: Any) -> Tensor:
        return attention_over_ranks(*tensors, scheme=self.scheme, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy_in_group(self, memo)

    def __getstate__(self) -> dict[str, Any]:
        """Without the group, for ``torch.save(module)``: set ``group`` after loading."""
        return state_without_group(self)

    def extra_repr(self) -> str:
        return (
            f"{self.scheme}, is_causal={self.is_causal}, window={self.window}, scale={self.scale}, "
            f"dropout_p={self.dropout_p}"
        )


class UlyssesAttention(AttentionOverRanks):
    """:func:`ulysses_attention` with the choices that do not change from call to call: see
    :class:`AttentionOverRanks`, with the scheme fixed.

    Args:
        group, heads, attend, is_causal, window, scale, dropout_p: as there.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup,
        heads: Partition | None = None,
        attend: Attend | None = None,
        is_causal: bool = False,
        window: tuple[int, int] | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__(
            group=group,
            scheme=ULYSSES,
            heads=heads,
            attend=attend,
            is_causal=is_causal,
            window=window,
            scale=scale,
            dropout_p=dropout_p,
        )

    def _attention(self, *tensors: Tensor, **options: Any) -> Tensor:
        return ulysses_attention(*tensors, **options)
