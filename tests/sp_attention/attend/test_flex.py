"""flex_attend against scaled_dot_product and against loops over single pairs.

torch has no backward of FlexAttention on the CPU: under no_grad these tests run FlexAttention itself, else the same
functions on whole tensors.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from sp_attention import flex_attend, scaled_dot_product
from sp_attention.attend import flex
from sp_attention.reference import reference_attention
from tests.support.attention.flex import PADDING_BL, slope, tensors

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}
# It says that the uncompiled function is slow: that is the point here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.usefixtures("uncovered"),
]


@pytest.fixture(params=[torch.no_grad, torch.enable_grad], ids=["flex_attention", "whole tensors"])
def mode(request: pytest.FixtureRequest) -> Iterator[AbstractContextManager[None]]:
    with request.param() as entered:
        yield entered


PAIRS_BNLL = torch.arange(2 * 4 * 5 * 7).view(2, 4, 5, 7) % 3 > 0
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"is_causal": True},
    "window": {"window": (2, 1)},
    "left": {"window": (1, -1)},
    "right": {"window": (-1, 0)},
    "causal window": {"window": (1, 3), "is_causal": True},
    "scale": {"scale": 0.7, "is_causal": True},
    "padding": {"key_padding_mask": PADDING_BL},
    "padding and causal": {"key_padding_mask": PADDING_BL, "is_causal": True},
    "pairs": {"attn_mask": PAIRS_BNLL},
    "pairs of no head": {"attn_mask": PAIRS_BNLL[:1, :1]},
    "keys": {"attn_mask": PAIRS_BNLL[:, :1, :1]},
    "bias": {"attn_mask": torch.linspace(-2, 2, 280, dtype=torch.float64).view(2, 4, 5, 7)},
    "bias and closed": {
        "attn_mask": torch.linspace(-2, 2, 7, dtype=torch.float64).masked_fill(~PAIRS_BNLL[:, :1], -math.inf),
        "is_causal": True,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_options_mean_what_they_mean_to_the_default(
    name: str, dtype: torch.dtype, mode: AbstractContextManager[None]
) -> None:
    q, k, v = tensors(5, 7, dtype)
    options = OPTIONS[name]
    got = flex_attend()(q, k, v, **options)
    wanted = scaled_dot_product(q, k, v, **options)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE[dtype])
    if name != "nothing":  # the option does something
        assert (got - flex_attend()(q, k, v)).abs().max() > 1e-3


@pytest.mark.parametrize("lengths", [(7, 5), (1, 4), (4, 1), (300, 290)])
def test_lengths_that_differ(lengths: tuple[int, int], mode: AbstractContextManager[None]) -> None:
    q, k, v = tensors(*lengths, v_width=4)
    some_options: list[dict[str, Any]] = [{}, {"is_causal": True}, {"window": (3, 0)}]
    for options in some_options:
        got, wanted = flex_attend()(q, k, v, **options), scaled_dot_product(q, k, v, **options)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (3, 1)])
def test_groups_of_heads(heads: tuple[int, int], mode: AbstractContextManager[None]) -> None:
    q, k, v = tensors(4, 4, heads=heads)
    torch.testing.assert_close(flex_attend()(q, k, v), scaled_dot_product(q, k, v), rtol=0, atol=1e-12)


def test_a_query_with_nothing_to_attend_to_gives_0(mode: AbstractContextManager[None]) -> None:
    q, k, v = tensors(5, 7)
    for attend, options in (
        (flex_attend(), {"key_padding_mask": torch.zeros(2, 7).bool()}),
        (flex_attend(mask_mod=lambda b, h, q, k: b < 0), {}),
        (flex_attend(), {"attn_mask": torch.full((5, 7), -math.inf)[None, None]}),
    ):
        assert torch.equal(attend(q, k, v, **options), torch.zeros(2, 5, 4, 8, dtype=torch.float64))
    q, k, v = tensors(7, 5)
    out = flex_attend()(q, k, v, is_causal=True)
    assert not out[:, :2].any()
    assert bool(out[:, 2:].any())


def test_what_padding_holds_has_no_effect(mode: AbstractContextManager[None]) -> None:
    q, k, v = tensors(5, 7)
    wanted = flex_attend()(q, k, v, key_padding_mask=PADDING_BL)
    poisoned = [x.masked_fill(~PADDING_BL[:, :, None, None], math.nan) for x in (k, v)]
    assert torch.equal(flex_attend()(q, *poisoned, key_padding_mask=PADDING_BL), wanted)


def test_many_lengths_in_one_process() -> None:
    """Dynamo gives up after some recompilations: lengths, windows and heads must not need one each."""
    with torch.no_grad():
        for length in range(1, 24, 2):  # it gives up after 8
            q, k, v = tensors(length, length)
            options = {
                "window": (length // 2, 0),
                "key_padding_mask": torch.arange(length) < torch.tensor([[1], [9]]),
            }
            got = flex_attend(score_mod=slope)(q, k, v, first_head=length, **options)
            distance = torch.arange(length) - torch.arange(length)[:, None]
            bias = (torch.arange(4) + length).view(4, 1, 1) * distance * 0.1
            wanted = reference_attention(q, k, v, attn_mask=bias[None].double(), **options)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def soft_cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return 1.5 * torch.tanh(score / 1.5)


def near_or_row_0(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (abs(query - key) <= head) | (batch == 0)


def by_loops(q: Tensor, k: Tensor, v: Tensor, first_head: int, allowed: Tensor) -> Tensor:
    """slope and near_or_row_0, a pair at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            kv = h // (q.shape[2] // k.shape[2])
            for i in range(q.shape[1]):
                keys = [j for j in range(k.shape[1]) if allowed[i, j] and (abs(i - j) <= h + first_head or b == 0)]
                scores = [float(q[b, i, h] @ k[b, j, kv]) / 8**0.5 + (h + first_head) * (j - i) * 0.1 for j in keys]
                total = sum(math.exp(score) for score in scores)
                for j, score in zip(keys, scores, strict=True):
                    out[b, i, h] += math.exp(score) / total * v[b, j, kv]
    return out


@pytest.mark.parametrize("first_head", [0, 3])
def test_functions_get_batch_global_head_query_and_key(first_head: int, mode: AbstractContextManager[None]) -> None:
    q, k, v = tensors(6, 6)
    got = flex_attend(score_mod=slope, mask_mod=near_or_row_0)(q, k, v, is_causal=True, first_head=first_head)
    wanted = by_loops(q, k, v, first_head, torch.ones(6, 6).tril().bool())
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)  # head * 0.1 is float32


def test_a_soft_cap(mode: AbstractContextManager[None]) -> None:
    q, k, v = (3 * x for x in tensors(4, 5))
    k4, v4 = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = 1.5 * torch.tanh(torch.einsum("bqnh,bknh->bnqk", q, k4) / 8**0.5 / 1.5)
    wanted = torch.einsum("bnqk,bknh->bqnh", scores.softmax(-1), v4)
    torch.testing.assert_close(flex_attend(score_mod=soft_cap)(q, k, v), wanted, rtol=0, atol=1e-12)


def test_the_attention_is_the_callers() -> None:
    calls: list[dict[str, Any]] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return flex_attention(*args, **kwargs)

    with torch.no_grad():
        flex_attend(attention=counted)(*tensors(3, 3), scale=0.5)
        flex_attend(attention=counted)(*tensors(3, 3), is_causal=True)
    assert [call["scale"] for call in calls] == [0.5, None]
    assert [call["block_mask"] is None for call in calls] == [True, False]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_default(name: str, dtype: torch.dtype) -> None:
    grads = []
    for attend in (flex_attend(), scaled_dot_product):
        inputs = [x.requires_grad_() for x in tensors(5, 7, dtype)]
        out = attend(*inputs, **OPTIONS[name])
        grads.append(torch.autograd.grad(out, inputs, torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)))
    for got, wanted in zip(*grads, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted, rtol=0, atol=10 * TOLERANCE[dtype])


def test_a_learned_bias_has_a_gradient() -> None:
    bias_N = torch.randn(5, dtype=torch.float64).requires_grad_()
    q, k, v = (x.requires_grad_() for x in tensors(4, 4))
    out = flex_attend(score_mod=lambda s, b, h, i, j: s + bias_N[h] * (j - i))(q, k, v, first_head=1)
    out.square().sum().backward()
    assert bias_N.grad is not None
    assert bias_N.grad[0] == 0
    assert bool((bias_N.grad[1:] != 0).all())

    def loss(bias: Tensor) -> Tensor:
        bias_1NLL = (bias[1:, None, None] * (torch.arange(4) - torch.arange(4)[:, None]))[None]
        return scaled_dot_product(q, k, v, attn_mask=bias_1NLL).square().sum()

    (wanted,) = torch.autograd.grad(loss(bias_N), bias_N)
    torch.testing.assert_close(bias_N.grad, wanted, rtol=0, atol=1e-12)


def close_two(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score + torch.tensor([-math.inf] * 2 + [0.0] * 5)[query]


@pytest.mark.parametrize(
    ("attend", "options"), [(flex_attend(), {"is_causal": True}), (flex_attend(score_mod=close_two), {})]
)
def test_gradients_where_nothing_is_attended_to_are_0(attend: Callable[..., Tensor], options: dict[str, Any]) -> None:
    inputs = [x.requires_grad_() for x in tensors(7, 5)]
    out = attend(*inputs, **options)
    grads = torch.autograd.grad(out, inputs, torch.full_like(out, 1.0))
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert not grads[0][:, :2].any()


def test_what_torch_has_no_backward_for() -> None:
    """Once torch has one on the CPU, whole tensors are not needed."""
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in tensors(4, 4, heads=(2, 2)))
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex_attention(q, k, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, mode: AbstractContextManager[None]) -> None:
    q, k, v = tensors(5, 5, dtype)
    out = flex_attend()(q, k, v, is_causal=True)
    assert out.dtype == dtype
    wanted = scaled_dot_product(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"is_causal": True, "window": (2, 0)}, (None, None, 5, 7)),
        ({"key_padding_mask": torch.ones(2, 7, dtype=torch.bool)}, (2, None, 5, 7)),
        ({"attn_mask": torch.ones(1, 1, 5, 7, dtype=torch.bool)}, (2, 4, 5, 7)),
    ],
)
def test_masks_are_made_for_each_row_and_head_only_where_they_differ(
    options: dict[str, Any], sizes: tuple[int | None, ...]
) -> None:
    """Uncompiled, torch evaluates them on the whole grid: B * n times the memory."""
    q_BLnH, k_BLnH = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 4, 8)
    with patch.object(flex, "create_block_mask", wraps=flex.create_block_mask) as made, torch.no_grad():
        flex_attend(attention=lambda q, k, v, **given: q)(q_BLnH, k_BLnH, k_BLnH, **options)
    assert made.call_args.args[1:] == sizes
