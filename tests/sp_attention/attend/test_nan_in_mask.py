"""NaN in a float mask is NaN in the answer, as torch has it: a bias that diverged does not look like closed pairs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sp_attention import blockwise_attend, flex_attend, scaled_dot_product
from sp_attention.blocks.dropout import Dropout
from sp_attention.reference import reference_attention

ATTENDS: dict[str, Callable[..., Tensor]] = {
    "default": scaled_dot_product,
    "flex": flex_attend(),
    "blocks": blockwise_attend(chunk=2),
    "reference": reference_attention,
}
BY_HAND: dict[str, dict[str, Any]] = {"sinks": {"sinks_n": torch.zeros(2)}, "dropout": {"dropout": Dropout(p=0.0)}}
# It says that the uncompiled function is slow: that is the point here.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


def torchs(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    tensors = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*tensors, attn_mask=attn_mask).transpose(1, 2)


def tensors_and_bias() -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 5, 2, 8, generator=draw, dtype=torch.float64) for _ in "qkv"]
    bias_BNLL = torch.randn(1, 2, 5, 5, generator=draw, dtype=torch.float64)
    bias_BNLL[0, 0, 1, 4] = -math.inf
    return tensors, bias_BNLL


def answer(attend: Callable[..., Tensor], tensors: list[Tensor], bias: Tensor, **options: Any) -> list[Tensor]:
    """The output, and the gradients of q, k, v and of the mask."""
    leaves = [x.clone().requires_grad_() for x in (*tensors, bias)]
    out = attend(*leaves[:3], attn_mask=leaves[3], **options)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def poisoned(bias_BNLL: Tensor, where: str) -> Tensor:
    bias_BNLL = bias_BNLL.clone()
    if where == "one":
        bias_BNLL[0, 1, 3, 2] = math.nan
    elif where == "a row":
        bias_BNLL[0, 1, 3] = math.nan
    elif where == "one, the rest closed":
        bias_BNLL[0, 1, 3], bias_BNLL[0, 1, 3, 2] = -math.inf, math.nan
    else:
        bias_BNLL[...] = math.nan
    return bias_BNLL


@pytest.mark.parametrize("where", ["one", "a row", "one, the rest closed", "all"])
@pytest.mark.parametrize("name", ATTENDS)
def test_output_and_gradients_are_nan_where_torchs_are(name: str, where: str) -> None:
    tensors, bias_BNLL = tensors_and_bias()
    bias_BNLL = poisoned(bias_BNLL, where)
    wanted = answer(torchs, tensors, bias_BNLL)
    got = answer(ATTENDS[name], tensors, bias_BNLL)
    assert bool(got[0].isnan().any())
    if "closed" in where:  # torch has NaN in the gradients of closed pairs of such a query, here they are 0
        got, wanted = ([answers[i] for i in (0, 1, 3)] for answers in (got, wanted))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12, equal_nan=True)


def test_flex_attention_itself_has_the_nan_of_torch() -> None:
    """Where nothing needs a gradient, whole tensors are not used."""
    tensors, bias_BNLL = tensors_and_bias()
    bias_BNLL = poisoned(bias_BNLL, "one")
    with torch.no_grad():
        got, wanted = (attend(*tensors, attn_mask=bias_BNLL) for attend in (flex_attend(), torchs))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("option", BY_HAND)
def test_the_softmax_by_hand_has_it_too(option: str) -> None:
    tensors, bias_BNLL = tensors_and_bias()
    bias_BNLL = poisoned(bias_BNLL, "a row")
    got, wanted = (answer(scaled_dot_product, tensors, bias_BNLL, **options) for options in (BY_HAND[option], {}))
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x.isnan(), y.isnan())


@pytest.mark.parametrize("name", ATTENDS)
def test_key_padding_hides_it(name: str) -> None:
    """As it hides whatever keys and values hold there."""
    tensors, bias_BNLL = tensors_and_bias()
    keep_BL = torch.arange(5).expand(1, 5) != 2
    wanted = answer(ATTENDS[name], tensors, bias_BNLL, key_padding_mask=keep_BL)
    bias_BNLL[..., 2] = math.nan
    got = answer(ATTENDS[name], tensors, bias_BNLL, key_padding_mask=keep_BL)
    assert all(bool(x.isfinite().all()) for x in got)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
