"""What a contender is: the protocol that a dispatcher of your own implements to be timed beside this library."""

from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor


class NotApplicable(ValueError):
    """A contender cannot do this workload; the text says why. Raised on every rank alike, before any collective."""


class Made(Protocol):
    """A contender that was made for a workload."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor: ...


class Contender(Made, Protocol):
    """One implementation, made once per workload and called many times.

    ``kind``, an attribute of the class, says which workloads it does: "dispatch", "ulysses" or "attention". It is
    "dispatch" where the attribute is missing.

    ``forward`` is differentiable and may communicate over ``group`` only. In a "dispatch" workload it gets
    ``x_tD`` (t, D), ``expert_tK`` (t, K) int64 and ``weight_tK`` (t, K) float32, and returns ``y_tD``: every row
    sent to its experts, which are the identity, and the weighted sum of what they give. In a "ulysses" workload it
    gets ``q_BlNH``, ``k_BlGH`` and ``v_BlGH`` and returns ``out_BlNH``, where attention is ``q + (k + v)``. In an
    "attention" workload it gets and returns the same, and attention is causal, scaled by H ** -0.5, over the last
    ``workload.window`` keys before a query's own and that one, or over all before it where ``window`` is -1.

    ``sharding``, where there is such an attribute of the object, says which tokens of an "attention" workload it gets
    on each rank; else they are ``workload.sharding``'s, contiguous.

    ``experts_keep``, where there is such an attribute, are tensors that the experts of the last forward keep for
    their own backward: they are not counted as kept.
    """

    def __init__(self, workload: Any, group: dist.ProcessGroup) -> None:
        """``workload`` is a DispatchWorkload, UlyssesWorkload or AttentionWorkload (see ``lab/bench/workloads``).
        Raise NotApplicable for one it cannot do."""
        ...
