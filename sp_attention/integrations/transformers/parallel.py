"""The calls of a training step in one object, with the mesh that all of them need."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.integrations.transformers import apply_expert_parallel

from ...batch.loss import MeanLoss
from ...parallel.on_mesh import OnMesh
from ...work.scheme import ULYSSES, Scheme
from .apply import apply_sequence_parallel
from .loss import causal_lm_loss
from .step import Step, gather_sequence, shard_batch


class Parallel(OnMesh):
    """Data, sequence and expert parallelism of Transformers' models. It knows a mesh, and neither a model nor a
    batch: so one serves several models, and several microbatches at once. Every rank makes one; collective.

    Args:
        dp, sp, ep, device_type: as for :func:`moe_dispatch.build_mesh`.

    Attributes:
        mesh: for the functions that each method names.

    Raises:
        ValueError: an impossible mesh.
    """

    def __init__(self, *, dp: int = 1, sp: int = 1, ep: int = 1, device_type: str) -> None:
        super().__init__(dp=dp, sp=sp, ep=ep, device_type=device_type)

    def apply(self, model: nn.Module, *, experts: Partition | None = None, scheme: Scheme = ULYSSES) -> None:
        """:func:`apply_sequence_parallel`, then :func:`moe_dispatch.integrations.transformers.apply_expert_parallel`,
        in place. What refuses, refuses before any expert is cut."""
        apply_sequence_parallel(model, self.mesh, scheme=scheme)
        apply_expert_parallel(model, self.mesh, experts=experts)

    def shard(
        self, *, lengths: Sequence[int] | None = None, sharding: TokenSharding | None = None, **batch: Tensor
    ) -> Step:
        """:func:`shard_batch`."""
        return shard_batch(batch, self.mesh, lengths=lengths, sharding=sharding)

    def loss(self, model: nn.Module, out: Any, step: Step, *, num_targets: int | Tensor | None = None) -> MeanLoss:
        """:func:`causal_lm_loss`."""
        return causal_lm_loss(model, out, step, num_targets=num_targets)

    def gather(self, x_BlD: Tensor, step: Step) -> Tensor:
        """:func:`gather_sequence`."""
        return gather_sequence(x_BlD, step)
