"""Experts are computed as their own class does, whatever their layout; a layout that is not known is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from moe_dispatch.integrations.transformers.interface import use_experts_implementation
from moe_dispatch.integrations.transformers.layout import compute, is_experts, problem_of_layout
from tests.support.tensors import TOLERANCE, difference

E, D, F = 3, 4, 6
ROWS = (2, 0, 5)


def experts_of(*, gate: Any = None, **flags: Any) -> Any:
    """Experts of a class that the decorator makes, with weights drawn."""

    class Experts(nn.Module):
        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__()
            has_gate, turned = flags.get("has_gate", True), flags.get("is_transposed", False)
            up = "gate_up_proj" if has_gate else "up_proj"
            for name, (inner, outer) in {up: (D, F * (1 + has_gate)), "down_proj": (F, D)}.items():
                shape = (E, inner, outer) if turned else (E, outer, inner)
                setattr(self, name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))
                if flags.get("has_bias", False):
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(E, outer, dtype=torch.float64)))
            self.num_experts, self.act_fn = E, nn.SiLU()

        def forward(self, x_TD: Tensor) -> Tensor:
            return x_TD

    if gate is not None:
        Experts._apply_gate = gate  # type: ignore[attr-defined]
    return use_experts_implementation(Experts, **flags)(PreTrainedConfig())


def interleaved(self: Any, h_MF: Tensor) -> Tensor:
    return h_MF[:, ::2] * torch.tanh(h_MF[:, 1::2])


def by_hand(experts: Any, x_MD: Tensor) -> Tensor:
    """Row by row."""
    state, rows = dict(experts.named_parameters()), []
    expert_of_row = [e for e, count in enumerate(ROWS) for _ in range(count)]
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    for x_D, e in zip(x_MD, expert_of_row, strict=True):
        into, out = state[up][e], state["down_proj"][e]
        h_F = x_D @ into if experts.is_transposed else into @ x_D
        h_F = h_F + state[f"{up}_bias"][e] if experts.has_bias else h_F
        if not experts.has_gate:
            h_F = nn.functional.silu(h_F)
        elif experts.is_concatenated:
            h_F = nn.functional.silu(h_F[:F]) * h_F[F:]
        else:
            h_F = h_F[::2] * torch.tanh(h_F[1::2])
        y_D = h_F @ out if experts.is_transposed else out @ h_F
        rows.append(y_D + state["down_proj_bias"][e] if experts.has_bias else y_D)
    return torch.stack(rows)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("kind", ["concatenated", "interleaved", "no gate"])
def test_any_known_layout_computes_what_it_means(kind: str, is_transposed: bool, has_bias: bool) -> None:
    flags = {"is_transposed": is_transposed, "has_bias": has_bias, "has_gate": kind != "no gate"}
    gate = interleaved if kind == "interleaved" else None
    experts = experts_of(gate=gate, is_concatenated=kind != "interleaved", **flags)
    assert is_experts(experts)
    assert problem_of_layout(experts) == ""
    x_MD = torch.randn(sum(ROWS), D, dtype=torch.float64)
    assert difference(compute(experts, x_MD, torch.tensor(ROWS)), by_hand(experts, x_MD)) <= TOLERANCE


def test_layouts_that_are_not_known_are_refused_by_name() -> None:
    norm, gate = experts_of(has_post_expert_norm=True), experts_of(is_concatenated=False)
    assert "Experts normalises what each expert gives" in problem_of_layout(norm)
    assert "interleaves gate and up, and has no _apply_gate" in problem_of_layout(gate)
    more, turned, flat, none = experts_of(), experts_of(), experts_of(), experts_of(has_gate=False)
    more.scale = nn.Parameter(torch.ones(E))
    assert "has the tensors ['down_proj', 'gate_up_proj', 'scale']" in problem_of_layout(more)
    turned.down_proj = nn.Parameter(torch.ones(D, F, E))
    assert "down_proj of Experts is (4, 6, 3)" in problem_of_layout(turned)
    flat.num_experts = 0
    assert "num_experts 0" in problem_of_layout(flat)
    none.act_fn = None
    assert "has no gate and no act_fn" in problem_of_layout(none)
    assert not is_experts(nn.Linear(2, 2))
