"""The calls of a training step of a model of one's own, with the mesh that all of them need."""

from collections.abc import Sequence

from torch import Tensor, nn

from moe_dispatch import Partition, TokenSharding, gather_tokens
from moe_dispatch.internals import uncompiled, unseen_by_policies

from ..batch.batch import Batch
from ..batch.loss import MeanLoss, mean_cross_entropy
from ..work.scheme import ULYSSES, Scheme
from .layers import spread_layers
from .mesh_batch import MeshBatch, shard_over_mesh
from .on_mesh import OnMesh, everyone


class Parallel(OnMesh):
    """Data, sequence, tensor and expert parallelism of one model or several: what a training step calls. It knows a
    mesh over all ranks, and neither a model nor a batch. Every rank makes one; collective. For models of Transformers
    there is :class:`sp_attention.integrations.transformers.Parallel`.

    Args:
        dp, sp, tp, ep, device_type: as for :func:`moe_dispatch.build_mesh`.

    Attributes:
        mesh: for the functions that each method names.

    Raises:
        ValueError: an impossible mesh.
    """

    def apply(self, model: nn.Module, *, experts: Partition | None = None, scheme: Scheme = ULYSSES) -> None:
        """Turn a model of one process into this rank's part of it, in place: each
        :class:`moe_dispatch.reference.ReferenceMoE` becomes a :class:`moe_dispatch.MoE` over "ep" with this rank's
        experts, each ``sp_attention.reference.ReferenceAttention`` a :class:`UlyssesAttention` over "sp", or in
        another scheme an :class:`AttentionOverRanks`.
        Parameters keep their names. A model on "meta" stays there; load it with
        :func:`moe_dispatch.share_of_state_dict`. Layers that were built with a group are left alone.

        Args:
            model: whole, and the same on every rank.
            experts: which rank of "ep" holds which experts; ``Partition.balanced`` if left out.
            scheme: how attention is spread over "sp".

        Raises:
            GroupError: on every rank, before anything is changed: a model without such layers, a partition that does
                not fit, hooks on such a layer, a scheme that "sp" cannot have, or ranks with different layers.
        """
        spread_layers(model, self.mesh, experts, scheme, everyone())

    @uncompiled("each batch would be another graph; cut batches outside of what is compiled")
    @unseen_by_policies
    def shard(
        self, batch: Batch, *, lengths: Sequence[int] | None = None, sharding: TokenSharding | None = None
    ) -> MeshBatch:
        """Cut a batch: rows over "dp", the sequence over "sp", and each piece of it over "tp". One exchange of 8
        bytes per pair of ranks makes sure that all ranks cut the same batch in the same way.

        Args:
            batch: whole, and the same on every rank.
            lengths: of the sequence on each rank of "sp", any numbers that add up to L. Balanced if left out.
            sharding: in place of lengths: of whole rows over the ranks of "sp", in any order of tokens, e.g. what
                :func:`balance` gives, or ``TokenSharding.zigzag``.

        Raises:
            ValueError: the same text on every rank, as of :func:`shard_batch`; lengths that do not add up, a sharding
                of another batch or number of ranks.
        """
        return shard_over_mesh(batch, self.mesh, lengths, sharding, everyone())

    def loss(self, logits_BlV: Tensor, part: MeshBatch, *, num_targets: int | Tensor | None = None) -> MeanLoss:
        """:func:`mean_cross_entropy` over the targets of all ranks."""
        batch = part.batch
        return mean_cross_entropy(
            logits_BlV, batch.target_Bl, group=everyone(), ignore_index=batch.ignore_index, num_targets=num_targets
        )

    def gather(self, x_BlD: Tensor, part: MeshBatch) -> Tensor:
        """:func:`moe_dispatch.gather_tokens`: (b, l, ...) of this rank's tokens -> (B, L, ...) on every rank."""
        return gather_tokens(x_BlD, sharding=part.sharding, group=everyone())
