"""Experts that Transformers shards and loads by itself, with rows that travel by this library."""

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...layout.mesh import ParallelMesh
from ...layout.partition import Partition
from .held import NAME, HeldExperts, LayerAtHand, decoder_layer, over_ranks
from .interface import EPImplementation, EPImplementationInterface
from .tokens import IMPLEMENTATION


def register_implementation() -> None:
    """Make ``DistributedConfig(ep_implementation="moe_dispatch")`` known to Transformers, in this process.

    Call it before ``from_pretrained``. Transformers shards experts (evenly, as DTensors), loads them and computes
    them with its own kernels (``experts_implementation``); only the exchange is ours, with any numbers of tokens per
    rank. Routing weights stay in their dtype. Three collectives per layer forward, two backward, and one more forward
    where the model is called without a ``step``: the ranks then tell how many tokens they have. With
    :func:`sp_attention.integrations.transformers.apply_sequence_parallel` the step tells.

    Transformers' FSDP2 *averages* gradients over its ranks. Our losses and :func:`moe_dispatch.sum_gradients` want
    sums: call ``set_force_sum_reduction_for_comms(True)`` and ``set_gradient_divide_factor(1.0)`` on each
    ``FSDPModule``. Registering changes no model, and may be repeated.
    """
    EPImplementationInterface.register(NAME, MoEDispatchEP)


class MoEDispatchEP(EPImplementation):
    """What Transformers makes of each experts module that its plan shards.

    Raises:
        ValueError: a mesh with tensor parallelism, whose ranks share their tokens.
    """

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        if tp_mesh.size() > 1:
            raise ValueError(
                f"ep_implementation={NAME!r} with tp_size={tp_mesh.size()}: ranks of a tensor-parallel group share "
                "their tokens, and each would send them; use tp_size=1, or another ep_implementation"
            )
        self.experts, group = experts, ep_mesh.get_group()
        self.held = HeldExperts(Partition((experts.num_experts,) * group.size()), group, LayerAtHand())
        setattr(experts, IMPLEMENTATION, self)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, D) tokens of this rank, (T, K) ids of all experts and (T, K) weights -> (T, D)."""
        return over_ranks(self.held, self.experts, hidden_states, top_k_index, top_k_weights, self._compute)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Transformers' forward of the experts is a closure over the first model, which a copy would compute with."""
        raise ValueError(
            "a model whose experts DistributedConfig sharded cannot be copied: the copy would compute with the "
            "experts of the first; load it twice, or cut experts by apply_expert_parallel"
        )

    def _compute(self, experts: Any, x_MD: Tensor, rows_per_expert_e: Tensor) -> Tensor:
        """By Transformers' kernel, as one choice of weight 1 for each row."""
        id_e = torch.arange(len(rows_per_expert_e), device=x_MD.device)
        id_M = id_e.repeat_interleave(rows_per_expert_e, output_size=len(x_MD))
        if len(x_MD):
            return self.experts_forward(x_MD, id_M.unsqueeze(1), x_MD.new_ones(len(x_MD), 1))
        # Kernels leave the graph without rows, and FSDP2 would not reduce on this rank.
        x_1D = x_MD.sum(0, keepdim=True)
        return self.experts_forward(x_1D, id_M.new_zeros(1, 1), x_1D.new_ones(1, 1))[:0]


def problem_of_mesh(model: nn.Module, mesh: ParallelMesh) -> str:
    """Why steps of ``mesh`` do not fit the experts that Transformers sharded; empty if they do or there are none."""
    for place, implementation in _implementations(model):
        ranks = tuple(dist.get_process_group_ranks(implementation.held.group))
        if ranks != mesh.ep_ranks:
            return (
                f"{place} is over the ranks {ranks} by DistributedConfig, but the mesh has ep over {mesh.ep_ranks}; "
                "use the same ep"
            )
    return ""


def follow_steps(model: nn.Module) -> None:
    """Have the experts that Transformers sharded read the step of their decoder layer."""
    at_hand: dict[str, LayerAtHand] = {}
    for place, implementation in _implementations(model):
        around = decoder_layer(place)
        if around not in at_hand:
            at_hand[around] = LayerAtHand.of(model.get_submodule(around))
        implementation.held.layer = at_hand[around]


def _implementations(model: nn.Module) -> Iterator[tuple[str, MoEDispatchEP]]:
    for place, module in model.named_modules():
        if IMPLEMENTATION in vars(module):
            yield place, vars(module)[IMPLEMENTATION]
