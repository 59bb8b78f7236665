"""torchtitan's own MoE block, and what torchtitan puts around it."""

from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor, nn
from torchtitan.models.common.config_utils import make_moe_config, make_router_config
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts
from torchtitan.models.common.moe_sharding import set_moe_sharding_config
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

DIM, HIDDEN, EXPERTS, CHOICES = 16, 32, 8, 3
EXPERT_WEIGHTS = ("w1_EFD", "w2_EDF", "w3_EFD")


def config_of(dispatcher: type[LocalTokenDispatcher]) -> MoE.Config:
    return make_moe_config(
        num_experts=EXPERTS,
        router=make_router_config(
            dim=DIM, num_experts=EXPERTS, gate_param_init={}, top_k=CHOICES, score_func="sigmoid", route_norm=True
        ),
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS),
            token_dispatcher=dispatcher.Config(num_experts=EXPERTS, top_k=CHOICES),
        ),
    )


def new_block(dispatcher: type[LocalTokenDispatcher], dtype: torch.dtype) -> MoE:
    """The same weights in every call, so wide that everything matters; ``parallelize`` of it is torchtitan's."""
    config = config_of(dispatcher)
    in_tp: dict[str, Any] = {"w1_EFD": spmd.S(1), "w2_EDF": spmd.S(2), "w3_EFD": spmd.S(1)}
    set_moe_sharding_config(config, enable_ep=True, enable_sp=False, expert_param_layout=in_tp)
    block, generator = config.build(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in block.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
        block.expert_bias_E.copy_(0.05 * torch.randn(EXPERTS, generator=generator))
    return block.to(dtype)


class Layer(nn.Module):
    """A transformer block without attention."""

    moe_enabled = True

    def __init__(self, block: MoE) -> None:
        super().__init__()
        self.moe = block

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.moe(x_BLD)


class Decoder(nn.Module):
    """What torchtitan's FSDP and checkpoints know of a model: layers, and nothing around them."""

    tok_embeddings = norm = lm_head = None
    enable_weight_tying = False

    def __init__(self, block: MoE) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"0": Layer(block)})

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.layers["0"](x_BLD)


@dataclass(frozen=True, eq=False)
class Routed:
    """Choices and scores that were made elsewhere, so that they have the same bits on any number of ranks."""

    score_BLK: Tensor
    expert_BLK: Tensor

    @classmethod
    def drawn(cls, batch: int, length: int) -> "Routed":
        generator = torch.Generator().manual_seed(13)
        score_BLE = torch.rand(batch, length, EXPERTS, generator=generator)
        return cls(*score_BLE.topk(CHOICES, sorted=False))


class RoutedOnly(nn.Module):
    """The routed experts of a block, by given choices."""

    def __init__(self, block: MoE, routed: Routed) -> None:
        super().__init__()
        self.routed_experts, self.routed = block.routed_experts, routed

    def forward(self, x_BlD: Tensor) -> Tensor:
        expert_BlK = self.routed.expert_BLK
        count_E = torch.bincount(expert_BlK.flatten(), minlength=EXPERTS)
        return self.routed_experts(x_BlD, self.routed.score_BLK, expert_BlK, count_E)
