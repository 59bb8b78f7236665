"""What one call of a layer is given: tokens, which of them are padding, and choices made elsewhere."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.sharding import TokenSharding
from ..plan.ids.format import ID_DTYPES
from ..routing.sites import Tap
from ..wire.devices import problem_of_devices
from ..wire.local_tensors import problem_of_dtensors
from .recompute import check_not_hidden, in_backward
from .router import TopKRouter
from .training_pass import is_metadata_pass


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Given:
    """Arguments of :meth:`MoE.forward`, as the caller passed them."""

    x_BlD: Tensor
    sharding: TokenSharding
    real_Bl: Tensor | None
    expert_BlK: Tensor | None

    def problem(self, group: dist.ProcessGroup, router: TopKRouter) -> str:
        """What is wrong with them on this rank of ``group``; empty where nothing is."""
        tensors = {"x": self.x_BlD, "real_Bl": self.real_Bl, "expert_BlK": self.expert_BlK}
        if problem := problem_of_dtensors(x_BlD=self.x_BlD, real_Bl=self.real_Bl, expert_BlK=self.expert_BlK):
            return problem
        for name, x in tensors.items():
            if not isinstance(x, Tensor) and (x is not None or name == "x"):
                return f"{name} is {type(x).__name__}; it has to be a tensor"
        shape = (*self.sharding.local_shape(group.rank()), router.dim)
        if tuple(self.x_BlD.shape) != shape or not self.x_BlD.is_floating_point():
            return (
                f"x is {tuple(self.x_BlD.shape)} of {self.x_BlD.dtype}; its shard in order {self.sharding.order!r} "
                f"is {shape}, of a floating-point dtype: pass the tokens that the sharding gives this rank"
            )
        wanted = {"real_Bl": (shape[:2], (torch.bool,)), "expert_BlK": ((*shape[:2], router.top_k), ID_DTYPES)}
        for name, (of_shape, dtypes) in wanted.items():
            tensor = tensors[name]
            if tensor is not None and (tuple(tensor.shape) != of_shape or tensor.dtype not in dtypes):
                kinds = " or ".join(map(str, dtypes))
                return (
                    f"{name} is {tuple(tensor.shape)} of {tensor.dtype}; for these tokens it has to be {of_shape} of "
                    f"{kinds}"
                )
        return problem_of_devices(group, **tensors)

    def real(self, of_tokens: Tensor) -> Tensor:
        """(b, l, ...) with 0 at padding, whatever was there, and no gradient there."""
        if self.real_Bl is None:
            return of_tokens
        return of_tokens.masked_fill(~self.real_Bl.unsqueeze(-1), 0)

    def or_replayed(self, tap: Tap, rank: int) -> "Given":
        """With the experts of a record, where one is replayed.

        Raises:
            ValueError: what is wrong on this rank.
        """
        if not tap.sources or is_metadata_pass():
            return self
        if self.expert_BlK is not None:
            raise ValueError("expert_BlK is given to a layer that replays a record; leave out one of the two")
        check_not_hidden()
        return replace(self, expert_BlK=tap.sources[-1].next(self.sharding, rank).to(self.x_BlD.device))

    def show(self, tap: Tap, expert_BlK: Tensor, rank: int) -> None:
        """What was chosen, to those who record or replay: once per forward."""
        if tap.is_used and not in_backward() and not is_metadata_pass():
            tap.show(expert_BlK, self.sharding, rank)

    def choices(self, router: TopKRouter, scores_BlE: Tensor) -> Tensor:
        """(b, l, K) int64: the given ids, or the router's; "no expert" (-1) at padding."""
        chosen_BlK = router.choose(scores_BlE) if self.expert_BlK is None else self.expert_BlK.to(torch.int64)
        return chosen_BlK if self.real_Bl is None else chosen_BlK.masked_fill(~self.real_Bl.unsqueeze(-1), -1)
