"""Rows times weights of a wider dtype: in pieces, with the bits of torch's product, which makes all of it wide."""

import pytest
import torch
from torch import Tensor

from moe_dispatch.layer import experts
from tests.support.live import LiveBytes

ROWS, HIDDEN = 300, 32
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def by_torch(x_MF: Tensor, weight_M: Tensor, dtype: torch.dtype) -> Tensor:
    return (x_MF * weight_M[:, None]).to(dtype)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", WIDER)
def test_the_bits_of_one_product_and_less_memory(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, strided: bool
) -> None:
    """Forward, backward, and the gradient of the gradient. Beyond the output and its gradient, pieces only."""
    monkeypatch.setattr(experts, "VALUES_AT_ONCE_CPU", 1000)
    draw = torch.Generator().manual_seed(0)
    x_MF = torch.randn(ROWS, HIDDEN, generator=draw).to(dtype)
    x_MF = (torch.stack([x_MF, x_MF], dim=-1)[..., 0] if strided else x_MF).requires_grad_()
    weight_M = torch.rand(ROWS, generator=draw, dtype=WIDER[dtype]).requires_grad_()
    pull_MF = torch.randn(ROWS, HIDDEN, generator=draw).to(dtype).requires_grad_()
    found = []
    for weigh in (experts.weighted, by_torch):
        with LiveBytes() as live:
            out_MF = weigh(x_MF, weight_M, dtype)
            grads = torch.autograd.grad(out_MF, (x_MF, weight_M), pull_MF, retain_graph=True)
        first = torch.autograd.grad(out_MF, (x_MF, weight_M), pull_MF, create_graph=True)
        second = torch.autograd.grad(first[0].sum() + first[1].sum(), (x_MF, weight_M, pull_MF))
        found.append((live.most, [out_MF, *grads, *first, *second]))
    (most, got), (most_by_torch, wanted) = found
    assert all(map(torch.equal, got, wanted))
    assert most < 3 * x_MF.nbytes < most_by_torch


@pytest.mark.parametrize("learned", [(True, False), (False, True)])
def test_what_wants_no_gradient_gets_none(monkeypatch: pytest.MonkeyPatch, learned: tuple[bool, bool]) -> None:
    monkeypatch.setattr(experts, "VALUES_AT_ONCE_CPU", 10)
    x_MF = torch.ones(4, 8, dtype=torch.bfloat16).requires_grad_(learned[0])
    weight_M = torch.full((4,), 0.3).requires_grad_(learned[1])
    experts.weighted(x_MF, weight_M, torch.bfloat16).sum().backward()
    assert (x_MF.grad is not None, weight_M.grad is not None) == learned
    wanted = [torch.full((4, 8), 0.3).to(torch.bfloat16), torch.full((4,), 8.0)]
    assert all(x.grad is None or torch.equal(x.grad, y) for x, y in zip((x_MF, weight_M), wanted, strict=True))
