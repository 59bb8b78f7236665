"""The attention of the debug model: to whole sequences in one process, or spread over "sp".

Letters: b rows of this data rank, m positions of its region, n heads of this rank of "tp".
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from sp_attention import attention_over_ranks, latent_attention_over_ranks
from sp_attention.reference import reference_attention
from sp_attention.spread.expansion import Expand

from .... import TokenSharding
from ..config.spreading import MASK, Spreading
from .packing import Packing


class Attention(Protocol):
    """What the model asks of attention."""

    @property
    def sends_latents(self) -> bool:
        """Whether keys and values are made of latents where they are used."""
        ...

    def attend(self, q_bmnH: Tensor, k_bmnH: Tensor, v_bmnH: Tensor) -> Tensor:
        """Causal attention of the region's tokens to whole sequences, within documents: (b, m, n, Hv)."""
        ...

    def attend_to_latents(self, q_bmnH: Tensor, latent_bmC: Tensor, expand: Expand, weight_XR: Tensor) -> Tensor:
        """The same, with keys and values that ``expand`` makes of latents and a weight, split over "tp" by heads."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeAttention:
    """Every token is here. ``packing``: where the documents lie."""

    packing: Packing

    @property
    def sends_latents(self) -> bool:
        return False

    def attend(self, q_bmnH: Tensor, k_bmnH: Tensor, v_bmnH: Tensor) -> Tensor:
        return reference_attention(q_bmnH, k_bmnH, v_bmnH, is_causal=True, **self.packing.options)

    def attend_to_latents(self, q_bmnH: Tensor, latent_bmC: Tensor, expand: Expand, weight_XR: Tensor) -> Tensor:
        return self.attend(q_bmnH, *expand(latent_bmC, weight_XR, heads=range(q_bmnH.shape[2])))


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadAttention:
    """Regions of ranks.

    Attributes:
        regions: the tokens of my data rank, over "sp".
        sp: those ranks.
        packing: where the documents lie.
        spreading: how the work is spread.
    """

    regions: TokenSharding
    sp: dist.ProcessGroup
    packing: Packing
    spreading: Spreading

    @property
    def sends_latents(self) -> bool:
        return self.spreading.latent_keys

    def attend(self, q_bmnH: Tensor, k_bmnH: Tensor, v_bmnH: Tensor) -> Tensor:
        return attention_over_ranks(*map(self._at_padding, (q_bmnH, k_bmnH, v_bmnH)), **self._options)

    def attend_to_latents(self, q_bmnH: Tensor, latent_bmC: Tensor, expand: Expand, weight_XR: Tensor) -> Tensor:
        # The rows of this rank's heads. What FSDP2 sums over "sp" is each rank's gradient, that of its own queries.
        weight_xR = cast(DTensor, weight_XR).to_local(grad_placements=[Shard(0)])
        q_bmnH, latent_bmC = map(self._at_padding, (q_bmnH, latent_bmC))
        return latent_attention_over_ranks(q_bmnH, latent_bmC, expand=expand, weights=(weight_xR,), **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        by_mask = self.spreading.documents_as == MASK
        return {
            "sharding": self.regions,
            "group": self.sp,
            "scheme": self.spreading.scheme,
            "is_causal": True,
            **(self.packing.options_by_mask if by_mask else self.packing.options),
        }

    def _at_padding(self, x_bm: Tensor) -> Tensor:
        """What attention gets, with NaN at padding if so asked for. Added, so that a gradient there is not lost: it
        has to be 0."""
        if not self.spreading.nan_padding:
            return x_bm
        nan_bL = self.packing.nan_of_place_L.to(x_bm.dtype).expand(self.regions.global_shape)
        nan_bm = self.regions.shard(nan_bL, self.sp.rank())
        return x_bm + nan_bm.view(*nan_bm.shape, *[1] * (x_bm.ndim - 2))
