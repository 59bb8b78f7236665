"""NaN in a query that is padding, or that has nothing to attend to, is in no gradient and in no other output."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch.testing import RankThreads
from sp_attention import blockwise_attend, flex_attend, scaled_dot_product, ulysses_attention
from sp_attention.blocks.dropout import Dropout
from sp_attention.reference import reference_attention
from tests.support.attention.batches import ORDERS, Order, sharding_of
from tests.support.ranks import world

ATTENDS: dict[str, Callable[..., Tensor]] = {
    "default": scaled_dot_product,
    "flex": flex_attend(),
    "blocks": blockwise_attend(chunk=2),
    "reference": reference_attention,
}
REAL_BL = torch.tensor([[1, 1, 1, 0, 1], [0, 0, 1, 1, 1]]).bool()
BY_HAND: dict[str, dict[str, Any]] = {"sinks": {"sinks_n": torch.zeros(2)}, "dropout": {"dropout": Dropout(p=0.5)}}
pairs_BNLL = REAL_BL[:, None, :, None] & REAL_BL[:, None, None, :]
# What says that a token is padding; with the last two, its query has no key.
WAYS: dict[str, dict[str, Any]] = {
    "padding": {"key_padding_mask": REAL_BL},
    "padding, causal": {"key_padding_mask": REAL_BL, "is_causal": True},
    "padding, window": {"key_padding_mask": REAL_BL, "window": (1, 1)},
    "bool mask": {"attn_mask": pairs_BNLL},
    "float mask": {"attn_mask": torch.zeros(2, 1, 5, 5).masked_fill(~pairs_BNLL, -math.inf).double()},
}


def tensors(poison: float) -> list[Tensor]:
    """Of two rows, q with ``poison`` in one number of each padding token and head; zeros at padding if it is 0."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, 2, 8, generator=draw, dtype=torch.float64) for _ in "qkv")
    q = q.masked_fill(~REAL_BL[..., None, None], 0.0)
    q[..., 3] = q[..., 3].masked_fill(~REAL_BL[..., None], poison)
    return [q, k, v]


def answer(attend: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The output, and gradients of what real tokens make of it."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attend(*leaves, **options)
    grads = torch.autograd.grad(out[REAL_BL].square().sum(), leaves)
    return out.detach(), list(grads)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*ATTENDS, *BY_HAND])
def test_it_is_in_no_gradient_and_in_no_other_output(name: str, way: str, poison: float) -> None:
    attend, options = ATTENDS.get(name, scaled_dot_product), WAYS[way] | BY_HAND.get(name, {})
    (wanted, wanted_grads), (got, grads) = (answer(attend, tensors(x), **options) for x in (0.0, poison))
    assert torch.equal(got[REAL_BL], wanted[REAL_BL])
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert torch.equal(grad, wanted_grad)  # NaN is not equal
    assert not grads[0][~REAL_BL].any()
    attends_BLn = (wanted != 0).any(-1)  # and dropout left something
    assert got[~REAL_BL][attends_BLn[~REAL_BL]].isnan().all()  # it is not hidden
    assert not got[~REAL_BL][~attends_BLn[~REAL_BL]].any()


@pytest.mark.parametrize("name", ATTENDS)
def test_a_query_of_a_real_token_stays_as_it_is(name: str) -> None:
    """Its NaN shows in its own output, and in gradients, as torch has it."""
    q, k, v = tensors(0.0)
    q[0, 1, 0, 3] = math.nan
    out, grads = answer(ATTENDS[name], [q, k, v], key_padding_mask=REAL_BL)
    assert out[0, 1, 0].isnan().all()
    assert not out[0, 1, 1].isnan().any()
    assert all(grad[0].isnan().any() for grad in grads)


@pytest.mark.parametrize("name", ATTENDS)
def test_finite_queries_at_padding_attend_as_before(name: str) -> None:
    """A mask of keys may mean tokens that nobody attends to, and that attend themselves."""
    q, k, v = tensors(0.5)
    with_mask = answer(ATTENDS[name], [q, k, v], key_padding_mask=REAL_BL)[0]
    wanted = answer(reference_attention, [q, k, v], attn_mask=REAL_BL[:, None, None, :])[0]
    torch.testing.assert_close(with_mask, wanted, rtol=1e-12, atol=1e-12)
    assert with_mask[~REAL_BL].all()


@pytest.mark.parametrize("name", ATTENDS)
def test_padding_of_other_keys_tells_nothing_of_queries(name: str) -> None:
    """Cross-attention to keys of another length."""
    q, k, v = tensors(math.nan)
    out = ATTENDS[name](q[:, 1:], k, v, key_padding_mask=REAL_BL)
    assert torch.equal(out.isnan().all((2, 3)), ~REAL_BL[:, 1:])


def over_ranks(rank: int, order: Order, name: str, poison: float) -> list[Tensor]:
    """This rank's output and gradients, batch first."""
    sharding = sharding_of(2, (2, 0, 3), order)
    turn: Callable[[Tensor], Tensor] = (lambda x: x) if order == "BL" else (lambda x: x.transpose(0, 1))
    leaves = [sharding.shard(turn(x), rank).clone().requires_grad_() for x in tensors(poison)]
    out = ulysses_attention(
        *leaves, sharding=sharding, group=world(), attend=ATTENDS[name], key_padding_mask=REAL_BL, is_causal=True
    )
    real_Bl = sharding.shard(turn(REAL_BL), rank)
    out.masked_fill(~real_Bl[..., None, None], 0.0).square().sum().backward()
    grads = [x.grad for x in leaves if x.grad is not None]
    return [turn(x.detach()) for x in (out, *grads)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["default", "flex"])
def test_over_ranks_too(name: str, order: Order, rank_threads: RankThreads) -> None:
    wanted, got = (
        [torch.cat(parts, dim=1) for parts in zip(*rank_threads.run(over_ranks, 3, order, name, x), strict=True)]
        for x in (0.0, math.nan)
    )
    assert torch.equal(got[0][REAL_BL], wanted[0][REAL_BL])
    assert len(got) == 4
    for grad, wanted_grad in zip(got[1:], wanted[1:], strict=True):
        assert torch.equal(grad, wanted_grad)
