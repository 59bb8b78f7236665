"""What a training step does to any model on a mesh."""

from typing import Any, Self

import torch.distributed as dist
from torch import Tensor, nn

from moe_dispatch import ParallelMesh, build_mesh, clip_grad_norm, sum_gradients
from moe_dispatch.internals import check_is_group

from .data_parallel import shard_over_ranks


class OnMesh:
    """A mesh, and what does not depend on whose model it is. See :class:`sp_attention.Parallel`."""

    mesh: ParallelMesh

    def __init__(self, *, dp: int = 1, sp: int = 1, tp: int = 1, ep: int = 1, device_type: str) -> None:
        self.mesh = build_mesh(dp=dp, sp=sp, tp=tp, ep=ep, device_type=device_type)

    @classmethod
    def on(cls, mesh: ParallelMesh) -> Self:
        """On a mesh that is there: no communication, no new process group."""
        made = cls.__new__(cls)
        made.mesh = mesh
        return made

    def fully_shard(self, module: nn.Module, **options: Any) -> None:
        """FSDP2's ``fully_shard`` of a module: experts in it over the ranks that hold the same ones, the rest over
        all ranks. Gradients are summed, never averaged. As with torch's: call it for each layer, then for the model,
        on every rank, after ``apply`` and before the optimizer is made.

        Args:
            options: of torch's: ``mp_policy``, ``reshard_after_forward``, ``offload_policy``, ``ignored_params``.

        Raises:
            ValueError: a mesh with tensor parallelism, under which each kind of parameter needs a mesh of its own.
        """
        shard_over_ranks(module, self.mesh, options)

    def sum_gradients(self, model: nn.Module) -> None:
        """:func:`moe_dispatch.sum_gradients` over all ranks, of experts over those that hold the same ones."""
        sum_gradients(model, group=everyone(), expert_group=self.mesh.expert.get_group("edp"))

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> Tensor:
        """:func:`moe_dispatch.clip_grad_norm`, after :meth:`sum_gradients`."""
        return clip_grad_norm(model, max_norm)


def everyone() -> dist.ProcessGroup:
    """All ranks: those of the mesh."""
    return check_is_group(dist.group.WORLD)
